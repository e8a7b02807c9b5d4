from pathlib import Path

import pytest

from lowbit.errors import LowbitError
from lowbit.suite import profiles


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


def test_who_may_skip_stands_in_the_file(project):
    assert not profiles.get("smoke").lets_skip("00_a")
    project.profiles("smoke: {description: x, timeout_minutes: 1, may_skip: [00_a, '1*']}")
    assert [profiles.get("smoke").lets_skip(name) for name in ("00_a", "00_ab", "10_b")] == [True, False, True]


def test_unknown_profile_is_refused(project):
    with pytest.raises(LowbitError, match=r"'dest'.*did you mean 'desk'"):
        profiles.get("dest")
