"""The process that executes one notebook: ``python -m lowbit_suite.running.worker JOB.json``, started by the runner.

Only its exit code decides the status (`EXIT`); the JSON file that it writes explains it in words.
"""

import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

from lowbit.files import write_text
from lowbit_suite import skip_grammars
from lowbit_suite.running.outputs import digest_of

EXIT = {"passed": 0, "failed": 65, "oom": 66, "killed": 67, "skipped": 68}
"""Exit code for each status a worker can report; any other code means that the worker itself broke."""

OUT_OF_MEMORY = re.compile(
    r"\w*MemoryError: |RuntimeError: .*(DefaultCPUAllocator: |CUDA out of memory)"
    r"|OSError: \[Errno 12\]",
    re.DOTALL,
)
"""Out-of-memory errors of Python, numpy, torch and the system, as ``name: message`` of an exception."""


def main(job_path: str) -> int:
    """Execute the notebook that the job file describes; return the exit code."""
    job = json.loads(Path(job_path).read_text(encoding="utf-8"))
    private = Path(job_path).parent
    _die_with(job["parent"], private)

    skip_grammars()
    import papermill
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    class Kernel(AsyncKernelManager):
        """A kernel with this interpreter, regardless of the user's kernelspecs, that needs no network port."""

        process = None

        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.connection_file = str(private / "kernel.json")
            if sys.platform != "win32":
                # Ports are picked first and bound later, so kernels that start together can pick the same one.
                # Sockets in a private folder cannot collide.
                self.transport = "ipc"
                self.ip = str(private / "k")

        @property
        def kernel_spec(self):
            argv = [
                sys.executable,
                "-m",
                "ipykernel_launcher",
                "-f",
                "{connection_file}",
                "--ext=lowbit_suite.running.watch",
            ]
            return KernelSpec(argv=argv, display_name="Python 3 (ipykernel)", language="python")

        async def start_kernel(self, **kwargs):
            await super().start_kernel(**kwargs)
            Kernel.process = getattr(self.provisioner, "process", None)

    place = {"cell": 0, "of": 0, "line": ""}

    def note_cell(cell, cell_index):
        if cell.cell_type == "code" and cell.source.strip():
            place["cell"] += 1
            place["line"] = cell.source.strip().splitlines()[0][:80]
            _write(job["progress"], place)

    def leave(status: str, reason: str = "", **facts: str | int) -> int:
        _write(job["reason"], {"reason": reason, **facts})
        return EXIT[status]

    output = Path(job["output"])
    source = json.loads(Path(job["input"]).read_text(encoding="utf-8"))
    place["of"] = sum(1 for c in source["cells"] if c["cell_type"] == "code" and "".join(c["source"]).strip())
    place["of"] += bool(job["parameters"])  # papermill adds a cell with them
    try:
        papermill.execute_notebook(
            _literal(job["input"]),
            _literal(job["output"]),
            job["parameters"],
            kernel_name="python3",
            language="python",
            progress_bar=False,
            cwd=job["cwd"],
            start_timeout=120,
            iopub_timeout=120,  # the default of 4 s fails notebooks on a busy machine
            kernel_manager_class=Kernel,
            on_cell_start=note_cell,
        )
    except PapermillExecutionError as error:
        if error.ename == "Skipped":  # lowbit.skip
            return leave("skipped", _one_line(error.evalue))
        text = f"{error.ename}: {error.evalue}"
        status = "oom" if OUT_OF_MEMORY.match(text) else "failed"
        # papermill goes on after a cell tagged raises-exception, so this is not always the last one
        number, lines = error.exec_count or place["cell"], error.source.strip().splitlines() or [place["line"]]
        return leave(status, f"{_one_line(text)} (code cell {number}: {lines[0][:80]})")
    except (DeadKernelError, RuntimeError) as error:
        if not isinstance(error, DeadKernelError) and "Kernel died" not in str(error):
            raise
        where = f"in code cell {place['cell']}: {place['line']}" if place["cell"] else "at its start"
        how, number = _how(Kernel.process)
        return leave("killed", f"the kernel died{how} {where}", signal=number)
    finally:
        _scrub(output)
    return leave("passed", digest=digest_of(output))


def _how(process) -> tuple[str, int]:
    """How the kernel ended, in words, and the signal (or 0); its exit code may take a moment to arrive."""
    code = None
    for _ in range(20):
        code = process.poll() if process is not None else None
        if code is not None:
            break
        time.sleep(0.05)
    if code is None:
        return "", 0
    return (f" ({signal.Signals(-code).name})", -code) if code < 0 else (f" (it left with exit code {code})", 0)


def _die_with(parent: int, private: Path) -> None:
    """End this process and its kernel once the runner has ended for any reason, and clean up after both."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        import psutil

        for child in psutil.Process().children(recursive=True):
            child.kill()
        shutil.rmtree(private, ignore_errors=True)
        os._exit(EXIT["killed"])

    if hasattr(os, "getppid") and sys.platform != "win32":
        threading.Thread(target=watch, daemon=True).start()


def _scrub(output: Path) -> None:
    """Remove this machine's paths from the metadata that papermill writes into the executed notebook."""
    try:
        tree = json.loads(output.read_text(encoding="utf-8"))
        for key in ("input_path", "output_path"):
            if key in tree["metadata"].get("papermill", {}):
                tree["metadata"]["papermill"][key] = output.name
        _write(output, tree)
    except (OSError, ValueError, KeyError):
        pass  # a crash leaves an incomplete file; the exit code decides


def _literal(path: str) -> str:
    """papermill formats paths with the parameters, so a brace in a folder's name has to be doubled."""
    return path.replace("{", "{{").replace("}", "}}")


def _one_line(text: str, limit: int = 300) -> str:
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _write(path: str | Path, tree: dict) -> None:
    write_text(path, json.dumps(tree, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
