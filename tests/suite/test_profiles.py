from pathlib import Path

import pytest

from lowbit import data
from lowbit.errors import LowbitError
from lowbit_suite import notebooks, profiles


def test_the_projects_own_file_has_all():
    found = profiles.load(Path(__file__).parents[2] / "notebooks" / profiles.FILE)
    assert tuple(found) == profiles.NAMES
    assert found["smoke"].threads == 1
    assert found["gpu"].requires == "cuda"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("smoke: {description: x, timeout_minutes: 1, thread: 1}", "smoke.thread: Extra inputs"),
        ("smoke: {description: x}", "smoke.timeout_minutes: Field required"),
        ("smoke: {description: x, timeout_minutes: -1}", "greater than 0"),
        ("smoke: {description: x, timeout_minutes: yes}", "smoke.timeout_minutes"),
        ("smok: {description: x, timeout_minutes: 1}", "'smok'.*did you mean 'smoke'"),
        ("smoke: {description: x, timeout_minutes: 1, may_skip: 00_a}", "smoke.may_skip: .*list"),
        ("smoke: [", "not YAML"),
    ],
)
def test_mistakes_in_the_file_are_refused(tmp_path, text, message):
    path = tmp_path / "profiles.yaml"
    path.write_text(text)
    with pytest.raises(LowbitError, match=message):
        profiles.load(path)


def test_the_study_is_no_profile_of_notebooks_and_says_where_it_runs(project):
    with pytest.raises(LowbitError, match=r"'study' has no notebooks.*'lowbit study run'"):
        profiles.get(profiles.STUDY)
    assert profiles.STUDY not in profiles.NAMES


def test_who_may_skip_stands_in_the_file(project):
    assert not profiles.get("smoke").lets_skip("00_a")
    project.profiles("smoke: {description: x, timeout_minutes: 1, may_skip: [00_a, '1*']}")
    assert [profiles.get("smoke").lets_skip(name) for name in ("00_a", "00_ab", "10_b")] == [True, False, True]


def test_unknown_profile_is_refused(project):
    with pytest.raises(LowbitError, match=r"'dest'.*did you mean 'desk'"):
        profiles.get("dest")


@pytest.mark.parametrize("name", ["smoke", "embedded", "desk", "gpu"])
def test_a_profile_fits_every_notebook_of_the_course(name):
    """Names and kinds of all parameters, also those of a profile that few machines can run; and real means real."""
    profile, chosen = profiles.get(name), notebooks.select([])
    resolved = notebooks.resolve(chosen, name, profile, {})
    used = {
        {**notebook.defaults, **resolved[notebook.name]}["dataset"]
        for notebook in chosen
        if "dataset" in notebook.defaults
    }
    assert {data.card(dataset).kind in ("embedded", "generated") for dataset in used} == {not profile.listed_only}


def test_paper_says_where_the_papers_recipes_are():
    with pytest.raises(LowbitError, match=r"paper has no settings for 08_.*configs/imagenet_\*.yaml"):
        notebooks.resolve(notebooks.select(["08*"]), "paper", profiles.get("paper"), {})


def test_a_notebook_that_is_not_listed_is_refused_where_only_listed_ones_run(project):
    project.add("00_first", "1", parameters="profile = 'smoke'")
    project.add("01_second", "1", parameters="profile = 'smoke'")
    project.profiles("desk: {description: real data, timeout_minutes: 1, listed_only: true, notebooks: {00_first: {}}}")
    found = profiles.get("desk")
    assert notebooks.resolve(notebooks.select(["00_first"]), "desk", found, {}) == {"00_first": {"profile": "desk"}}
    with pytest.raises(LowbitError, match=r"desk has no settings for 01_second,.*smoke values: .* \(desk: real data\)"):
        notebooks.resolve(notebooks.select([]), "desk", found, {})
