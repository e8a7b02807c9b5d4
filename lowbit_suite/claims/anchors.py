"""Published anchors: results of full training from the literature (``notebooks/anchors.yaml``), shown with the claims.

No verdict reads them: networks, data and lengths differ from those of this project.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from lowbit import paths, yamls
from lowbit.errors import LowbitError

FILE = "anchors.yaml"

TITLE = "Published, for comparison: other networks, data and lengths"

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class Anchor(BaseModel):
    """A published result or finding.

    Attributes:
        id: Short name, unique in the file.
        claims: Ids of the claims it is an anchor for.
        method: Name of the method; it says "reproduction" if its authors did not train it themselves.
        network: Name of the network.
        data: Name of the data set.
        bits: Width of weights and activations, such as ``W2A2``; ``W3`` where the source gives no width for
            activations; None for findings.
        value: The number as published; None for findings and unchecked entries.
        unit: Unit of ``value`` and ``full_precision``.
        full_precision: The number of the full-precision twin in the same source.
        recipe: Epochs, teacher and initialization, as far as the source says.
        finding: One sentence in place of a number.
        source: Authors, title, venue and table.
        checked: Whether the number or finding was read in the source itself.
        note: Where it was read, or why it could not be.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    id: Annotated[str, StringConstraints(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
    claims: list[Text] = Field(min_length=1)
    method: Text
    network: Text
    data: Text
    bits: Annotated[str, StringConstraints(pattern=r"^W\d+(A\d+)?$")] | None
    value: float | None = Field(default=None, allow_inf_nan=False)
    unit: Text | None = None
    full_precision: float | None = Field(default=None, allow_inf_nan=False)
    recipe: Text
    finding: Text | None = None
    source: Text
    checked: bool
    note: Text

    @model_validator(mode="after")
    def _number_or_finding(self) -> Self:
        if self.checked and (self.value is None) == (self.finding is None):
            raise ValueError("a checked entry has either a value or a finding")
        if not self.checked and (self.value is not None or self.finding is not None):
            raise ValueError("an entry that is not checked has neither a value nor a finding")
        if (self.value is None) != (self.unit is None):
            raise ValueError("value and unit go together")
        if self.full_precision is not None and self.value is None:
            raise ValueError("full_precision needs a value")
        return self


def load(path: Path | None = None) -> list[Anchor]:
    """Read all anchors of a file (default: the project's).

    Raises:
        LowbitError: the file is missing, is not a list, or an entry has an unknown, missing or wrong key.
    """
    path = path or paths.notebooks() / FILE
    if not path.is_file():
        raise LowbitError(f"there is no {FILE} in {path.parent}: run inside the project, or set LOWBIT_PROJECT to it")
    tree = yamls.load(path.read_text(encoding="utf-8"), FILE)
    if not isinstance(tree, list):
        raise LowbitError(f"{FILE} has to be a list of entries")
    anchors = [_parse(number, entry) for number, entry in enumerate(tree, start=1)]
    if twice := [id for id, count in Counter(anchor.id for anchor in anchors).items() if count > 1]:
        raise LowbitError(f"{FILE}: more than one entry has the id {twice[0]!r}; ids are unique")
    return anchors


def markdown(claim_id: str, anchors: Sequence[Anchor] | None = None) -> list[str]:
    """Format the anchors of a claim as lines of Markdown: title, table, findings, and what could not be checked.

    Args:
        claim_id: Id of the claim, such as ``"D5"``.
        anchors: From `load`; by default the project's file is read.

    Returns:
        The lines, without blank lines around them; empty if the claim has no anchor.
    """
    anchors = load() if anchors is None else anchors
    mine = [anchor for anchor in anchors if claim_id in anchor.claims]
    numbers = [anchor for anchor in mine if anchor.value is not None]
    findings = [anchor for anchor in mine if anchor.finding is not None]
    unchecked = [anchor for anchor in mine if not anchor.checked]
    blocks = []
    if numbers:
        sources = list(dict.fromkeys(anchor.source for anchor in numbers))
        head = ["method", "network", "data", "bits", "published", "full precision", "recipe", "source"]
        rows = [_row([*_cells(anchor), f"[{sources.index(anchor.source) + 1}]"]) for anchor in numbers]
        blocks.append([_row(head), "|" + "---|" * len(head), *rows])
        blocks.append([f"- [{number}] {_line(source)}." for number, source in enumerate(sources, start=1)])
    if findings:
        blocks.append([_line(f"- {one.method}; {one.network}: {one.finding} ({one.source})") for one in findings])
    if unchecked:
        blocks.append(
            [_line(f"- Not listed: {one.method}; {one.network}, {one.data}: {one.note}.") for one in unchecked]
        )
    return [f"*{TITLE}.*", *(line for block in blocks for line in ("", *block))] if blocks else []


def _parse(number: int, entry: object) -> Anchor:
    named = isinstance(entry, dict) and isinstance(entry.get("id"), str)
    name = repr(entry["id"]) if named else str(number)
    try:
        return Anchor.model_validate(entry)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            key = ".".join(map(str, item["loc"]))
            lines.append(f"{FILE}: entry {name}: {key + ': ' if key else ''}{item['msg']}")
        raise LowbitError("\n".join(lines)) from None


def _cells(anchor: Anchor) -> list[str]:
    twin = "" if anchor.full_precision is None else str(anchor.full_precision)
    published = f"{anchor.value} {anchor.unit}"
    return [anchor.method, anchor.network, anchor.data, anchor.bits or "", published, twin, anchor.recipe]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_line(cell).replace("|", "\\|") for cell in cells) + " |"


def _line(text: str) -> str:
    return " ".join(text.split())
