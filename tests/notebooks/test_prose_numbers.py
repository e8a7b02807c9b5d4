"""No measured number is typed into a notebook: it would part from the measurement. It has to come through a cell.

A test cannot tell a measured number from a chosen one, so every number with a decimal point or a unit in the prose,
in comments and in texts of the code is counted in numbers_in_prose.yaml. Add one there only if it is a setting, a
definition, arithmetic, or cited from a paper.
"""

import html
import io
import re
import tokenize
from collections import Counter
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_raw_cell

from lowbit import paths

NOTEBOOKS = sorted(paths.notebooks().glob("[0-9][0-9]_*.ipynb"))
ALLOWED = yaml.safe_load(Path(__file__).with_name("numbers_in_prose.yaml").read_text())

UNIT = (
    r"(?:%|‰|×|x\b|fold\b|[mµun]?s\b|sec(?:ond)?s?\b|min(?:ute)?s?\b|hours?\b|[KMGkmg]i?B\b|(?:mega|giga|kilo)?bytes?\b|"
    r"times\b|per ?cent\b|points?\b|FPS\b|images? (?:a|per) second)"
)
NUMBER = r"[-−+]?\d[\d.,]*(?:[eE]-?\d+)?"
TENS = r"(?:twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|hundred)"
FORMS = re.compile(
    rf"(?<![\w.])(?:{NUMBER}\s?-?{UNIT}|{NUMBER}\s(?:of|out of|in)\s(?:the\s)?{NUMBER}|[-−+]?\d*[.,]\d+"
    rf"|(?<=\|)\s*{NUMBER}\s*(?=\|)|{TENS}(?:-\w+)?\s{UNIT})",
    re.IGNORECASE,
)


def texts(notebook):
    """What a person reads: prose, raw cells, comments and the texts in the code, without values put in by the code."""
    for cell in notebook.cells:
        if cell.cell_type != "code":
            yield cell.source
            continue
        plain = "".join("" if line.lstrip().startswith(("%", "!")) else line for line in cell.source.splitlines(True))
        for token in tokenize.generate_tokens(io.StringIO(plain).readline):
            if token.type in (tokenize.COMMENT, tokenize.STRING):
                yield re.sub(r"\{[^{}]*\}", " ", token.string) if token.type == tokenize.STRING else token.string


def numbers(notebook):
    found = Counter()
    for text in texts(notebook):
        text = re.sub(r"\]\([^)]*\)|https?://\S+|arXiv \d{4}\.\d{4,5}", " ", html.unescape(text))
        text = re.sub(r"<[^>]*>", "|", text)  # a cell of an HTML table
        text = re.sub(r"\\,|\\;|~|[\u00a0\u2009\u202f]", " ", text)
        text = re.sub(r"[*_`$\\]", "", text)
        found.update(" ".join(number.split()) for number in FORMS.findall(text))
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_number_in_prose_is_known(path):
    known, found = Counter(ALLOWED.get(path.stem, {})), numbers(nbformat.read(path, as_version=4))
    assert dict(found - known) == {}, "measured? print it by a cell; a setting? add it to numbers_in_prose.yaml"
    assert dict(known - found) == {}, "no longer there: take it out of numbers_in_prose.yaml"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_picture_is_pasted_into_the_prose(path):
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type != "code":
            assert not cell.get("attachments") and not re.search(r"!\[|<img|data:image", cell.source)


@pytest.mark.parametrize(
    "cell",
    [
        new_markdown_cell("It reaches 91.3 %."),
        new_markdown_cell("It reaches 91%."),
        new_markdown_cell("It reaches 91&#37; of them."),
        new_markdown_cell("It reaches $91\\,\\%$."),
        new_markdown_cell("It reaches **91** %."),
        new_markdown_cell("It reaches 91\u202f%."),
        new_markdown_cell("It reaches ٩١ %."),
        new_markdown_cell("It reaches ninety-one percent."),
        new_markdown_cell("It reaches 0.913."),
        new_markdown_cell("It reaches .913."),
        new_markdown_cell("It reaches 0,913."),
        new_markdown_cell("It finds 91 of 100."),
        new_markdown_cell("| method | right |\n|---|---|\n| LSQ | 91 |"),
        new_markdown_cell("<table><tr><td>91</td></tr></table>"),
        new_markdown_cell("It is 3-fold."),
        new_markdown_cell("It takes 12 ms and 3 times the memory."),
        new_markdown_cell("`accuracy = 91 %`"),
        new_raw_cell("It reaches 91 %."),
        new_code_cell("x = 1  # reaches 91 %"),
        new_code_cell("print('accuracy 91.3')"),
        new_code_cell("%matplotlib inline\nprint(f'accuracy 91 % {1 + 1:5.1f}')"),
    ],
    ids=lambda cell: cell.source[:30],
)
def test_a_smuggled_number_is_noticed(cell):
    assert numbers(new_notebook(cells=[cell]))


@pytest.mark.parametrize("cell", [
    new_markdown_cell("Seen in [arXiv 2208.09708](https://arxiv.org/abs/2208.09708): 4 bits, 10 classes, equation 12."),
    new_code_cell("print(f'{accuracy:.1f} of {total:5.2f}')\nrate = 0.05"),
])  # fmt: skip
def test_what_is_no_measurement_is_left_alone(cell):
    assert not numbers(new_notebook(cells=[cell]))
