"""Explorables on pages without a kernel: ``python -m lowbit_suite.explorables.pages FOLDER`` writes a page with all.

The page is the template for others. It takes two things, in Sphinx too: the modules beside the page's other static
files (`copy_modules`), and `EMBED`, once a page. Every ``<div data-explorable="denseshift">`` on it then becomes live;
the stored outputs of notebooks hold such elements, with the PNG twin inside.
"""

import shutil
import sys
from pathlib import Path

from lowbit_suite.command import plain_errors
from lowbit_suite.explorables import ALT, FOLDER, figure

EMBED = '<script type="module" src="{folder}/embed.js"></script>'
"""The line that makes a page's explorables live; ``folder`` is where `copy_modules` has put the modules."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Explorables</title>
</head>
<body>
{body}
{embed}
</body>
</html>
"""


def copy_modules(folder: Path) -> None:
    """Copy the JavaScript modules into ``folder``, which is created if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in FOLDER.glob("*.js"):
        shutil.copy(path, folder)


def page(names: list[str], folder: str = "explorables") -> str:
    """A page with the explorables ``names`` and their modules in ``folder`` beside it; it has to come from a server."""
    body = "\n".join(figure(name) for name in names)
    return PAGE.format(body=body, embed=EMBED.format(folder=folder))


if __name__ == "__main__":
    with plain_errors():
        target = Path(sys.argv[1])
        copy_modules(target / "explorables")
        (target / "index.html").write_text(page(list(ALT)))
        print(f"{target / 'index.html'}: to look at it, python -m http.server --directory {target}")
