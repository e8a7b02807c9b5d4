"""The version, which stands in ``lowbit/__init__.py`` alone: ``python tools/version.py [TAG]``.

With a tag: exit status 1 unless it is ``v`` and the version, and CHANGELOG.md has a section for that version. Needs
nothing but Python, so that a release can ask before anything is installed.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def version(root: Path = ROOT) -> str:
    """The version as a string."""
    (found,) = re.findall(r'^__version__ = "(.+)"$', (root / "lowbit" / "__init__.py").read_text("utf-8"), re.M)
    return found


def flaw(tag: str, root: Path = ROOT) -> str:
    """Why ``tag`` does not match the version or the changelog; empty if it does."""
    now = version(root)
    if tag != f"v{now}":
        return f"the tag is {tag}, and lowbit/__init__.py says {now}: the tag has to be v{now}"
    if not re.search(rf"^## \[{re.escape(now)}\]", (root / "CHANGELOG.md").read_text("utf-8"), re.M):
        return f"CHANGELOG.md has no section [{now}]: name the changes before they are released"
    return ""


if __name__ == "__main__":
    if wrong := flaw(sys.argv[1]) if len(sys.argv) > 1 else "":
        sys.exit(wrong)
    print(version())
