"""The code of the how-to pages runs, as it stands there, from the first line to the last."""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
HOWTO = PROJECT / "docs" / "howto"
RUN = {"ablation.sh", "cluster.sh", "method.sh", "ranks.sh"}


def run(command: list[str], folder: Path, **variables: str) -> str:
    """Standard output of ``command`` in ``folder``; this environment's programs and this source tree come first."""
    environment = os.environ | {
        "PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(PROJECT),
        "OMP_NUM_THREADS": "1",
        "TQDM_DISABLE": "1",
    }
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=300,
        start_new_session=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def script(name: str, replaced: dict[str, str] | None = None) -> str:
    """A script of docs/howto, with other words in the place of some."""
    text = (HOWTO / name).read_text()
    for old, new in (replaced or {}).items():
        assert old in text
        text = text.replace(old, new)
    return text


def shell(text: str, folder: Path, **variables: str) -> str:
    """Run a script with ``lowbit`` from this source tree; what it starts in the background ends with it."""
    (folder / "bin").mkdir()
    for command, module in (("lowbit", "lowbit"), ("torchrun", "torch.distributed.run"), ("python", "")):
        program = folder / "bin" / command
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {f"-m {module}" if module else ""} "$@"\n')
        program.chmod(0o755)
    return run(["bash", "-ec", f"trap 'kill $(jobs -p) 2> /dev/null || true' EXIT\n{text}"], folder, **variables)


def test_every_script_is_run_here():
    assert {path.name for path in HOWTO.glob("*.sh")} == RUN
    assert {path.name for path in HOWTO.glob("*.py")} == {
        "quantize.py",
        "deploy.py",
        "ablation.py",
        "elsewhere.py",
        "with_executorch.py",
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("quantize", r"(?s)4 levels True.*same answers True\nas trained True"),
        ("deploy", ""),
        ("elsewhere", "same answers True"),
        ("ablation", r"95 % interval .* 5 seeds\)"),
    ],
)
def test_python(name, said, tmp_path):
    told = run([sys.executable, str(HOWTO / f"{name}.py")], tmp_path, LOWBIT_RESULTS=str(tmp_path / "results"))
    assert re.search(said, told), told


@pytest.mark.slow
def test_executorch(tmp_path):
    pytest.importorskip("executorch", reason="needs executorch 1.2 (with torch 2.11), which brings its own torchao")
    assert "same answers True" in run([sys.executable, str(HOWTO / "with_executorch.py")], tmp_path)


@pytest.mark.slow
def test_a_notebook_with_other_parameters(tmp_path):
    told = shell(script("ablation.sh"), tmp_path, LOWBIT_RESULTS=str(tmp_path / "results"))
    assert "passed" in told and (tmp_path / "results/runs/smoke/report.html").is_file(), told


@pytest.mark.slow
def test_a_cluster_on_this_machine(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    away = {"dask scheduler": f"{sys.executable} -m dask scheduler --no-dashboard", "8786": port}
    away |= {"dask worker": f"{sys.executable} -m dask worker --no-dashboard"}
    told = shell(script("cluster.sh", away), tmp_path, LOWBIT_RESULTS=str(tmp_path / "results"))
    assert "passed" in told, told


@pytest.mark.slow
def test_two_ranks(tmp_path):
    shutil.copytree(PROJECT / "configs", tmp_path / "configs")
    told = shell(
        script("ranks.sh", {"torchrun": "torchrun --standalone"}), tmp_path, LOWBIT_RESULTS=str(tmp_path / "results")
    )
    assert list((tmp_path / "results").rglob("*.json")), told


@pytest.mark.slow
def test_a_new_method_in_a_copy_of_the_sources(tmp_path):
    for name in ("lowbit", "lowbit_suite", "benchmarks", "tools", "tests", "notebooks"):
        shutil.copytree(PROJECT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.ipynb"))
    for name in ("pyproject.toml", "data", "results"):
        (tmp_path / name).symlink_to(PROJECT / name)
    told = shell(script("method.sh"), tmp_path, PYTHONPATH=str(tmp_path))
    assert re.search(r"\d\d+ passed", told) and "failed" not in told, told


@pytest.mark.slow
def test_the_first_cell_on_colab_and_binder_unpacks_the_course_once(tmp_path):
    sys.path.insert(0, str(PROJECT / "docs"))
    import launch

    cell = launch.INSTALL.format(repository="https://github.com/someone/lowbit")
    where = "import lowbit\nprint('course:', lowbit.paths.project())\n%cd -q ..\n"
    (tmp_path / "cell.ipy").write_text(cell + where + cell + where)  # the second notebook finds what the first unpacked
    told = shell("python -m IPython cell.ipy", tmp_path)
    assert told.count(f"course: {tmp_path.resolve() / 'course'}\n") == 2 and "Traceback" not in told, told
