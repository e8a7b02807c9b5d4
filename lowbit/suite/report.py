"""report.html: one page about a run, complete in itself."""

import base64
from pathlib import Path

from lowbit.suite.runfile import Run, write_text


def write(run: Run, folder: Path) -> Path:
    path = folder / "report.html"
    write_text(path, "todo")
    return path


def notebook_html(path: Path) -> Path | None:
    """Renders an executed notebook beside itself; None where the file is not a whole notebook (after a crash)."""
    import nbformat
    from nbconvert import HTMLExporter

    try:
        body, _ = HTMLExporter().from_notebook_node(nbformat.read(path, as_version=4))
    except Exception:
        return None
    target = path.with_suffix(".html")
    write_text(target, body)
    return target
