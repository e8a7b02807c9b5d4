"""Explorables: pictures whose controls a reader can drag, each with a PNG twin for where nothing can be dragged.

Each is an ES module in this folder that exports ``render({model, el})`` as anywidget wants it. In a notebook with a
kernel, `explorable` shows it live. On a page without one, ``embed.js`` does (`lowbit_suite.explorables.pages`).
"""

import base64
import html
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent

ALT = {
    "denseshift": (
        "Three settings of the latents of a 3-bit DenseShift weight. For each: which gates are open, the run of open "
        "gates at the end of the chain, the weight, and the gradient of each latent. A closed gate stops the gradient "
        "of all gates before it."
    ),
    "oscillation": (
        "Left: a weight with its optimum at 0.3 jumps between the levels 0 and 1 while its latent stays near the "
        "boundary. Right: reversals a step over the optimum. With a fixed scale they follow 2 times min(d, 1 - d) at "
        "two learning rates; with a learned scale they follow the same formula for levels that have moved."
    ),
    "query_key": (
        "The angle between the gradient of the keys and the full-precision gradient while the query matrix turns, at 2 "
        "bits. With rounded factors it jumps, up to tens of degrees. With one rounded product it is zero if the "
        "gradient at the logits is given, and mostly smaller, but not zero, if it comes from a loss."
    ),
    "annealing": (
        "Left: histogram of a trained network's latent weights around three thresholds, with the narrow zones in which "
        "they may move filled. Right: the share of weights that may move grows in proportion to the boundary range, "
        "and the share that reaches a threshold stops growing where the boundary range exceeds the reach."
    ),
}
"""Name of each explorable: the alternative text of its PNG twin."""


def source(name: str) -> str:
    """The module ``name`` as one file: the modules that it imports are put in the place of the imports.

    Raises:
        LowbitError: there is no such explorable.
    """
    _check(name)
    text = (FOLDER / f"{name}.js").read_text()

    def inline(match: re.Match) -> str:
        return re.sub(r"^export ", "", (FOLDER / f"{match[1]}.js").read_text(), flags=re.M)

    return re.sub(r'^import \{[^}]*\} from "\./(\w+)\.js";\n', inline, text, flags=re.M)


def figure(name: str) -> str:
    """The PNG twin as HTML that needs no other file; ``embed.js`` puts the live explorable in its place.

    Raises:
        LowbitError: there is no such explorable.
    """
    _check(name)
    png = base64.b64encode((FOLDER / "twins" / f"{name}.png").read_bytes()).decode()
    image = f'<img src="data:image/png;base64,{png}" alt="{html.escape(ALT[name])}" style="max-width: 100%">'
    return f'<div data-explorable="{name}">{image}</div>'


class Twin:
    """What `explorable` returns without anywidget: displays the PNG twin."""

    def __init__(self, name: str):
        self.bundle = {"text/html": figure(name), "text/plain": ALT[name]}

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return self.bundle


def explorable(name: str) -> Any:
    """Show an explorable: live where anywidget is installed and the page has a kernel, else its PNG twin.

    Args:
        name: "denseshift", "oscillation", "query_key" or "annealing".

    Returns:
        An object to be the last line of a notebook's cell.

    Raises:
        LowbitError: there is no such explorable.
    """
    twin = Twin(name)
    try:
        from anywidget import AnyWidget
    except ImportError:
        return twin

    class Explorable(AnyWidget):
        _esm = source(name)

        def _repr_mimebundle_(self, **options: Any) -> Any:
            live = super()._repr_mimebundle_(**options)
            if not live:
                return twin.bundle
            data, metadata = live
            return {**data, **twin.bundle}, metadata

    return Explorable()


def _check(name: str) -> None:
    if name not in ALT:
        from lowbit.errors import LowbitError

        raise LowbitError(f"there is no explorable {name!r}; there are {', '.join(ALT)}")
