"""Checks a built site: ``python docs/check.py FOLDER`` lists broken internal links and ends with 1 if there are any.

Also refused: a page that loads a script, style, font or image from elsewhere.
"""

import re
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bs4 import BeautifulSoup

LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "srcset", "link": "href"}
NO_LOAD = {"canonical", "index", "search", "next", "prev", "author"}
"""Relations of a ``<link>`` that load nothing."""


def loaded(soup: BeautifulSoup) -> list[str]:
    """The addresses of everything that a page loads by itself."""
    tags = [tag for tag in soup.find_all(list(LOADS)) if not (tag.name == "link" and NO_LOAD & set(tag.get("rel", [])))]
    return [tag[LOADS[tag.name]] for tag in tags if tag.get(LOADS[tag.name])]


def problems(folder: Path) -> list[str]:
    """One line for each broken internal link and each thing loaded from elsewhere."""
    written = [
        path for path in folder.rglob("*.html") if "_static" not in path.parts
    ]  # the theme's templates lie there
    pages = {path: BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser") for path in written}
    anchors = {path: {tag["id"] for tag in soup.find_all(id=True)} | {""} for path, soup in pages.items()}
    found = []
    for page, soup in pages.items():
        where, loads = page.relative_to(folder), loaded(soup)
        for address in [*loads, *(tag["href"] for tag in soup.find_all("a", href=True))]:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                if address in loads and parts.scheme != "data":
                    found.append(f"{where} loads {address}")
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            if not target.is_file():
                found.append(f"{where} links to {address}, which is not there")
            elif target in anchors and unquote(parts.fragment) not in anchors[target]:
                found.append(f"{where} links to {address}, which has no such place")
    for style in folder.rglob("*.css"):
        for address in re.findall(r"url\(\s*[\"']?((?:https?:)?//[^)\"']+)", style.read_text(encoding="utf-8")):
            found.append(f"{style.relative_to(folder)} loads {address}")
    return sorted(set(found))


if __name__ == "__main__":
    told = problems(Path(sys.argv[1]).resolve())
    print("\n".join(told) or "every internal link leads somewhere; nothing is loaded from elsewhere")
    sys.exit(bool(told))
