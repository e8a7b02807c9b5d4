"""Numbers quoted in prose, bound to the record that they come from: ``python -m tools.quotes FILE.md...``.

A measured number in a Markdown file carries a comment that readers of the rendered page do not see::

    1.09<!--= bench/training.json; case=training step, vit-d192, batch 64; engine=lsq eager; ratio; .2f -->

the file in ``results/`` (a CSV, or a JSON list of objects), the values that pick its row, the column, and Python's
format. Where several rows fit, as with one row a seed, the column is ``mean NAME``. Between ``<!-- verdicts -->`` and
``<!-- /verdicts -->`` stands the table of what ``lowbit claims`` wrote. The command writes what is recorded into the
files; a test fails while something quoted differs from its record.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from lowbit import paths
from lowbit.errors import LowbitError
from lowbit.files import write_text
from lowbit_suite import claims
from lowbit_suite.command import plain_errors

QUOTE = re.compile(r"(?P<shown>[-−+]?\d[\d.,]*)?<!--=(?P<binding>.*?)-->", re.DOTALL)
VERDICTS = re.compile(r"(?<=<!-- verdicts -->\n)(?P<shown>.*?)(?=<!-- /verdicts -->)", re.DOTALL)


@dataclass(frozen=True)
class Quote:
    """A bound number or table of verdicts: its text in the file, and the text that its record gives."""

    shown: str
    recorded: str
    binding: str


def find(text: str, results: Path | None = None) -> list[Quote]:
    """All bound numbers of a text, in order, and then its tables of verdicts.

    Raises:
        LowbitError: A binding that is not of the form above, or that picks no row, or several without ``mean``.
    """
    results = results or paths.results()
    found = []
    for match in QUOTE.finditer(text):
        binding = " ".join(match["binding"].split())
        found.append(Quote(match["shown"] or "", _recorded(binding, results), binding))
    found += [Quote(match["shown"], verdicts(results), "verdicts") for match in VERDICTS.finditer(text)]
    return found


def refresh(text: str, results: Path | None = None) -> str:
    """Replace every bound number and table in the text by its record's."""
    quotes = iter(find(text, results))
    text = QUOTE.sub(lambda match: f"{next(quotes).recorded}<!--={match['binding']}-->", text)
    return VERDICTS.sub(lambda match: next(quotes).recorded, text)


def verdicts(results: Path) -> str:
    """The claims with verdict, effect of the first statement and looks, as a table in Markdown.

    A dagger marks a verdict that is another one if corrected for the number of the claim's primary statements.
    """
    found = claims.read(results)
    lines = [f"| | claim | at `{claims.MAIN}` | effect | looks |", "|---|---|---|---|---|"]
    for name, claim in claims.judged(found).items():
        looks = "; ".join(
            f"`{look.profile}`: {claims.judgment(look)} ({look.tally})" for look in claims.looks(found, name)
        )
        effect = claims.effect(claim.first)
        lines.append(f"| {name} | {claim.claim} | {_verdict(claim)} | {effect} | {looks} |")
    return "\n".join(lines) + "\n"


def _verdict(claim: claims.Claim) -> str:
    held = sum(statement.verdict == "reproduced" for statement in claim.primary)
    mark = "**" if claim.verdict == "reproduced" else ""
    note = "†" if claim.weakened else ""
    count = "" if claim.verdict == "not tested" else f" ({held} of {len(claim.primary)})"
    where = "" if claim.profile == claims.MAIN else f", at `{claim.profile}`"
    return f"{mark}{claim.verdict}{mark}{note}{count}{where}"


def _recorded(binding: str, results: Path) -> str:
    import pandas as pd

    file, *conditions, column, form = (
        [part.strip() for part in binding.split(";")] if binding.count(";") > 1 else [""] * 3
    )
    path = results / file
    if not file or not path.is_file() or path.suffix not in (".csv", ".json"):
        raise LowbitError(f"<!--={binding}--> has to be 'FILE; column=value; ...; column; format', FILE in results/")
    rows = (pd.read_csv if path.suffix == ".csv" else pd.read_json)(path)
    name, mean = column.removeprefix("mean "), column.startswith("mean ")
    for condition in conditions:
        key, _, value = condition.partition("=")
        rows = rows[rows[key].astype(str) == value] if key in rows else rows[:0]
    if name not in rows or not (len(rows) == 1 or (mean and len(rows))):
        raise LowbitError(
            f"<!--={binding}--> fits {len(rows)} rows of {file}, whose columns are {', '.join(map(str, rows))}: "
            "it has to fit one row and name a column, or several rows and 'mean column'"
        )
    try:
        return format(float(rows[name].mean()), form)
    except (ValueError, TypeError) as error:
        raise LowbitError(f"<!--={binding}-->: {error}") from None


if __name__ == "__main__":
    with plain_errors():
        for given in map(Path, sys.argv[1:]):
            before = given.read_text(encoding="utf-8")
            after = refresh(before)
            changed = sum(quote.shown != quote.recorded for quote in find(before))
            write_text(given, after)
            print(f"{given}: {changed} of {len(find(after))} quotes changed")
