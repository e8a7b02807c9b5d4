"""Checks a built site: ``python docs/check.py FOLDER`` lists broken internal links and ends with 1 if there are any.

Also refused: a page that loads a script, style, font or image from elsewhere; a picture without an alternative text of
its own; a table with a cell that no header names.
"""

import re
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bs4 import BeautifulSoup, Tag

LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "srcset", "link": "href"}
NO_LOAD = {"canonical", "index", "search", "next", "prev", "author"}
"""Relations of a ``<link>`` that load nothing."""


def loaded(soup: BeautifulSoup) -> list[str]:
    """The addresses of everything that a page loads by itself."""
    tags = [tag for tag in soup.find_all(list(LOADS)) if not (tag.name == "link" and NO_LOAD & set(tag.get("rel", [])))]
    return [tag[LOADS[tag.name]] for tag in tags if tag.get(LOADS[tag.name])]


def undescribed(soup: BeautifulSoup) -> list[str]:
    """Pictures without an alternative text of their own, and tables with a cell that no header names."""
    found, described = [], {}
    for image in soup.select("article img"):
        text, address = image.get("alt", ""), image["src"]
        if len(text) < 40:
            found.append(f"shows {address} with too short an alternative text: {text!r}")
        elif described.setdefault(text, address) != address:
            found.append(f"shows {address} with the alternative text of {described[text]}")
    for table in soup.select("article table:not(.genindextable)"):  # Sphinx sets its index as a table
        if has_unnamed_cell(table):
            found.append(f"has a table with a cell that no header names: {table.get_text(' ', strip=True)[:60]}")
    return found


def has_unnamed_cell(table: Tag) -> bool:
    """Whether a cell with text has no header with text, neither above it nor in its row."""
    named: set[int] = set()
    for row in table.find_all("tr"):
        column, heads, cells = 0, set(), set()
        for cell in row.find_all(["th", "td"]):
            columns = range(column, column + int(cell.get("colspan", 1)))
            if cell.get_text(strip=True):
                (heads if cell.name == "th" else cells).update(columns)
            column = columns.stop
        named |= heads
        if not heads and not cells <= named:
            return True
    return False


def problems(folder: Path) -> list[str]:
    """One line for each broken internal link, thing loaded from elsewhere, and undescribed picture or table."""
    written = [
        path for path in folder.rglob("*.html") if "_static" not in path.parts
    ]  # the theme's templates lie there
    pages = {path: BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser") for path in written}
    anchors = {path: {tag["id"] for tag in soup.find_all(id=True)} | {""} for path, soup in pages.items()}
    found = []
    for page, soup in pages.items():
        where, loads = page.relative_to(folder), loaded(soup)
        found += [f"{where} {problem}" for problem in undescribed(soup)]
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
    print("\n".join(told) or "links, pictures and tables are in order, and nothing is loaded from elsewhere")
    sys.exit(bool(told))
