"""Writes the schematic drawings of `lowbit_suite.drawings` beside this file: ``python docs/pictures/schemes.py``.

They need torch and matplotlib, so that is done by hand and the output is committed; a test draws them again.
"""

import io
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

from lowbit_suite import drawings, plotting


def draw() -> dict[str, str]:
    """The text of every file, by its name."""
    plotting.use_style()
    files = {}
    with matplotlib.rc_context(
        {"svg.hashsalt": "lowbit", "svg.fonttype": "path", "figure.constrained_layout.use": False}
    ):
        for name in drawings.ALT:
            figure = getattr(drawings, name)()
            text = io.StringIO()
            figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
            plt.close(figure)
            files[f"{name}.svg"] = text.getvalue()
    return files


if __name__ == "__main__":
    for name, text in draw().items():
        (Path(__file__).parent / name).write_text(text, encoding="utf-8")
