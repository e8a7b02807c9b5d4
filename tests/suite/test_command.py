"""The command: one line and status 2 for ordinary mistakes, ``-h`` and ``--version`` everywhere, any terminal."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import lowbit
from lowbit import paths
from lowbit.errors import LowbitError
from lowbit_suite.app import app
from lowbit_suite.command import Group

DIGITS = str(paths.project() / "configs" / "digits_vit_nano.yaml")


def call(*words, **environment):
    return CliRunner().invoke(app, list(words), env=environment)


def every_command(command, words=()):
    yield words
    for name, below in getattr(command, "commands", {}).items():
        yield from every_command(below, (*words, name))


def test_every_command_has_a_version_and_a_short_help():
    everything = list(every_command(typer.main.get_command(app)))
    assert len(everything) > 20
    for words in everything:
        assert call(*words, "--version").stdout == f"lowbit {lowbit.__version__}\n", words
        told = call(*words, "-h")
        assert told.exit_code == 0 and "--version" in told.stdout, words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bananas"], "No such command 'bananas'"),
        (["run", "--bananas"], "No such option: --bananas"),
        (["run", "-j", "two"], "-j"),
        (["data", "fetch"], "Missing argument"),
        (["run", "nope"], "no notebook is called 'nope'"),
        (["run", "00_start_here", "-p", "epochs="], "epochs='' has type str"),
        (["run", "00_start_here", "-p", "epochs=yes"], "epochs='yes' has type str"),
        (["run", "00_start_here", "-p", "epochs=null"], "epochs=None"),
        (["run", "00_start_here", "-p", "epochs=1", "-p", "epochs=2"], "gives 'epochs' twice"),
        (["run", "00_start_here", "-p", "epochs=[&a 1, *a]"], "write the value out"),
        (["train", "/nowhere.yaml"], "No such file"),
        (["train", "/"], "Is a directory"),
        (["train", sys.executable], "is no text"),
        (["train", DIGITS, "--set", "train.epochs=1", "--set", "train.epochs=2"], "gives 'train.epochs' twice"),
        (["train", DIGITS, "--set", "train.epochs="], "epochs=None is not allowed"),
        (["train", DIGITS, "--set", "model.patch_size=0"], "cannot be built with these options"),
        (["train", DIGITS, "--device", "banana"], "device='banana' is not allowed"),
        (["train", DIGITS, "--device", "meta"], "device='meta' is not allowed"),
        (["train", DIGITS, "--out", "/proc/x", "--set", "data.subset.train=128"], "could not be written"),
        (["pack", "/nowhere", "x"], "no file"),
        (["claims", "--out", "/nowhere"], "no run.json"),
    ],
)
def test_an_ordinary_mistake_is_one_line(words, message):
    told = call(*words, TQDM_DISABLE="1")
    assert (told.exit_code, told.stdout) == (2, "")
    assert told.stderr.startswith("lowbit: ") and message in told.stderr and told.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("environment", "message"),
    [({"WORLD_SIZE": "2"}, "start them with torchrun"), ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"),
     ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0'")],
)  # fmt: skip
def test_processes_that_nobody_started_are_told(environment, message, monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    told = call("train", DIGITS, **environment)
    assert told.exit_code == 2 and message in told.stderr and told.stderr.count("\n") == 1


def test_a_cache_that_cannot_be_made_is_one_line():
    told = call("data", "fetch", "cifar10", LOWBIT_CACHE="/proc/x", LOWBIT_DATA="/nowhere")
    assert told.exit_code == 2 and "/proc/x" in told.stderr and told.stderr.count("\n") == 1
    assert "set the environment variable LOWBIT_CACHE" in told.stderr


def test_a_home_that_cannot_be_written_is_enough_to_work_with(tmp_path, monkeypatch):
    """What needs no cache works; what needs one says how to name another."""
    code = (
        "import lowbit, torch; from lowbit.quantizers import DenseShift\n"
        "model = lowbit.quantize_(lowbit.models.create('resnet8', 10), lowbit.QuantConfig(weight=DenseShift(bits=3)))\n"
        "packed = lowbit.pack(model.eval())\n"
        "lowbit.load(lowbit.save(packed, 'packed.safetensors'))(torch.zeros(1, 3, 32, 32))"
    )
    for name in ("LOWBIT_CACHE", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    source = os.pathsep.join(filter(None, [str(paths.SOURCES), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"HOME": "/proc/none", "PYTHONPATH": source}

    def python(*words):
        return subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )

    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    done = python("-m", "lowbit", "doctor")
    assert done.returncode == 0 and "instruction sets" in done.stdout, done.stderr
    done = python("-m", "lowbit", "data", "fetch", "cifar10")
    assert done.returncode == 2 and "/proc/none" in done.stderr and "LOWBIT_CACHE" in done.stderr


@pytest.mark.parametrize("words", [["claims"], ["run"], ["check"], ["accept"], ["again", "00_start_here"], ["mutate"],
    ["study", "run"], ["study", "status"], ["study", "tables"], ["study", "pause"], ["new", "notebook", "77_x"],
    ["new", "quantizer", "fresh"], ["train", DIGITS]])  # fmt: skip
def test_nothing_is_written_outside_a_project(words, tmp_path, monkeypatch):
    monkeypatch.delenv("LOWBIT_RESULTS", raising=False)
    monkeypatch.setenv("LOWBIT_PROJECT", str(tmp_path))
    told = call(*words)
    assert told.exit_code == 2 and f"{tmp_path} is no lowbit project" in told.stderr and told.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_claims_do_not_go_into_a_results_folder_from_outside_a_project(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWBIT_PROJECT", str(tmp_path))
    told = call("claims", LOWBIT_RESULTS=str(tmp_path / "results"))
    assert told.exit_code == 2 and not list(tmp_path.iterdir())


def failing(error):
    own = typer.Typer(cls=Group)

    @own.command()
    def fail() -> None:
        raise error

    @own.command()
    def other() -> None:
        pass

    return CliRunner().invoke(own, ["fail"])


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (LowbitError("first\nsecond"), 2, "lowbit: first; second\n"),
        (
            PermissionError(13, "Permission denied", "/secret"),
            2,
            "lowbit: /secret: Permission denied; give a path that",
        ),
        (KeyboardInterrupt(), 130, ""),
        (typer.Abort(), 1, "lowbit: no answer"),
        (typer.Exit(3), 3, ""),
    ],
)
def test_how_a_command_ends(error, status, said):
    told = failing(error)
    assert told.exit_code == status and told.stderr.startswith(said)


def test_a_fault_of_the_program_keeps_its_traceback():
    assert isinstance(failing(ZeroDivisionError()).exception, ZeroDivisionError)


def test_an_ascii_terminal_shows_what_it_can():
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    told = subprocess.run(
        [sys.executable, "-m", "lowbit", "doctor"],
        env={**os.environ, **ascii_only, "PYTHONPATH": str(Path(lowbit.__file__).parents[1])},
        capture_output=True,
    )
    assert told.returncode == 0 and b"torchvision" in told.stdout and told.stdout.isascii() and not told.stderr


def test_a_reader_that_leaves_early_ends_the_command_quietly():
    command = subprocess.Popen(
        [sys.executable, "-m", "lowbit", "data", "list"],
        env={**os.environ, "PYTHONPATH": str(Path(lowbit.__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    command.stdout.close()
    assert (command.stderr.read(), command.wait()) == (b"", 1)
