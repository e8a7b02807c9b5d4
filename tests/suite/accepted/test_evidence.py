"""What `lowbit accept` brings to results/ beside the numbers: whole, nothing stale, and nothing of other notebooks."""

import pytest

from lowbit_suite.accepted import evidence
from lowbit_suite.records import journal
from lowbit_suite.running.run_json import Entry, Run

NAME = "02_made"


@pytest.fixture
def run(project):
    """A run at desk in which 02_made has passed and 03_other has not; both have left everything."""
    folder = project.results / "runs" / "desk"

    def write(place, text):
        path = folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    for name in (NAME, "03_other"):
        number = name[:2]
        for place in (f"tables/{name}/{number}_y.csv", f"tables/{name}/{number}_y.json"):
            write(place, f"{name} {place}")
        for figure in (f"{number}_learning_rates", f"{number}_with_and_without_zero", f"{number}_code_books"):
            write(f"figures/{name}/{figure}.png", figure)
        write(journal.place(name), '{"of": ""}\n{"sweep": "1 t", "arm": {}, "seed": 0, "result": 1}\n')
    entries = [Entry(NAME, status="passed"), Entry("03_other", status="failed")]
    return Run("desk", "2030", {}, entries), folder


def there(project):
    kinds = ("tables", "figures", "journals")
    return {str(p.relative_to(project.results)) for k in kinds for p in (project.results / k).rglob("*") if p.is_file()}


ALL = {
    "tables/desk/02_y.csv",
    "tables/desk/02_y.json",
    "figures/desk/02_learning_rates.png",
    "figures/desk/02_with_and_without_zero.png",
    f"journals/desk/{NAME}.jsonl",
}


def test_tables_trainings_and_main_pictures_of_what_passed_are_kept(project, run):
    assert len(evidence.changed(*run)) == len(ALL)
    evidence.keep(*run)
    assert there(project) == ALL
    assert (project.results / "tables/desk/02_y.csv").read_text() == f"{NAME} tables/{NAME}/02_y.csv"
    assert evidence.changed(*run) == []


def test_what_the_notebook_no_longer_makes_goes_and_all_else_stays(project, run):
    evidence.keep(*run)
    for name in ("02_old.csv", "02_y.csv", "03_y.csv", "12_y.csv"):
        (project.results / "tables" / "desk" / name).write_text("old")
    smoke = project.results / "tables" / "embedded"
    smoke.mkdir()
    (smoke / "02_old.csv").write_text("of another profile")
    assert {path.name for path in evidence.changed(*run)} == {"02_old.csv", "02_y.csv"}
    evidence.keep(*run)
    assert there(project) == ALL | {"tables/desk/03_y.csv", "tables/desk/12_y.csv", "tables/embedded/02_old.csv"}
    assert (project.results / "tables/desk/02_y.csv").read_text() != "old"


def test_nothing_is_kept_of_a_run_at_smoke(project, run):
    done, folder = run
    done.profile = "smoke"
    assert evidence.changed(done, folder) == []
    evidence.keep(done, folder)
    assert there(project) == set()


def test_a_journal_without_trainings_is_not_kept(project, run):
    done, folder = run
    (folder / journal.place(NAME)).write_text('{"of": ""}\n')
    evidence.keep(done, folder)
    assert there(project) == {path for path in ALL if not path.startswith("journals")}


def test_every_picture_named_is_one_that_a_notebook_saves():
    from lowbit import paths

    code = "".join(path.read_text() for path in paths.notebooks().glob("*.ipynb"))
    assert [name for name in evidence.PICTURES if f'\\"{name}\\"' not in code] == []
