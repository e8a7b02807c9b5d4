"""`Plan`: a plan in memory, run by the compiled kernels. Needs numpy, not torch."""

import ctypes
import os
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lowbit.engine import format as file_format
from lowbit.errors import LowbitError
from lowbit.files import write_atomically
from lowbit.kernels import native

if TYPE_CHECKING:
    import torch

_NO_MEMORY, _BAD_PLAN = 1, 5


class Plan:
    """A network that C code runs in one call. Calls from several threads at once are allowed.

    Args:
        content: the bytes of a plan's file.
        threads: number of threads of a call. They share the items of a batch, or the work of each operation if there
            is a single item. None takes the number of cores that this process may use.

    Raises:
        LowbitError: the bytes are not a plan, or the compiled kernels are missing.
    """

    def __init__(self, content: bytes, threads: int | None = None):
        self.content = content
        self.threads = threads or _cores()
        self._library = _declared(native.loaded())
        plan, why = ctypes.c_void_p(), ctypes.create_string_buffer(256)
        status = self._library.lb_plan_load(content, len(content), ctypes.byref(plan), why, len(why))
        if status == _BAD_PLAN:
            raise LowbitError(f"this is not a plan that can be run: {why.value.decode()}")
        _raise(status)
        self._plan = plan
        weakref.finalize(self, self._library.lb_plan_free, plan)
        header = np.frombuffer(content, file_format.HEADER, 1)[0]
        tensors = np.frombuffer(content, file_format.TENSOR, int(header["tensors"]), file_format.HEADER.itemsize)
        self.arena_bytes = int(header["arena_bytes"])
        x, y = tensors[header["input"]], tensors[header["output"]]
        self.inputs, self.outputs = (int(t["height"] * t["width"] * t["channels"]) for t in (x, y))
        self.input_shape = tuple(int(x[name]) for name in ("channels", "height", "width"))
        self.output_shape = tuple(int(y[name]) for name in ("height", "width", "channels"))

    def __call__(self, x: Any) -> Any:
        """Compute the outputs for a batch.

        Args:
            x: float32 ``[B, ...]`` with as many numbers for each item as the network's example had; a torch tensor on
                the CPU or a numpy array.

        Returns:
            Float32 ``[B, outputs]``, an array or a tensor as ``x`` is.

        Raises:
            LowbitError: ``x`` has another dtype, device or number of values.
        """
        if isinstance(x, np.ndarray):
            return self._run_numpy(x)
        return self._run_torch(x)

    def save(self, path: str | Path) -> Path:
        """Write the plan to a file and return its path."""
        write_atomically(path, lambda file: file.write(self.content))
        return Path(path)

    def operations(self) -> list[dict[str, Any]]:
        """The operations in order: kind, numbers of the tensors, size of the output, bits, and bytes of data."""
        header = np.frombuffer(self.content, file_format.HEADER, 1)[0]
        at = file_format.HEADER.itemsize
        tensors = np.frombuffer(self.content, file_format.TENSOR, int(header["tensors"]), at)
        ops = np.frombuffer(self.content, file_format.OP, int(header["ops"]), at + tensors.nbytes)
        rows = []
        for op in ops:
            out = tensors[max(op["out"])]
            row: dict[str, Any] = {"kind": file_format.KINDS[op["kind"]]}
            row |= {side + "puts": [int(i) for i in op[side] if i >= 0] for side in ("in", "out")}
            row |= {name: int(out[name]) for name in ("height", "width", "channels")}
            row |= {"bits": int(op["n"][2]) if row["kind"] == "product" else None, "bytes": int(op["data"][:, 1].sum())}
            rows.append(row)
        return rows

    def time(self, x: np.ndarray, repeats: int = 20) -> np.ndarray:
        """Seconds per operation for the first item of ``x`` on one thread, the minimum over ``repeats`` calls."""
        item = np.ascontiguousarray(x[:1], np.float32)
        y = np.empty(self.outputs, np.float32)
        library = self._library
        least = np.full(len(self.operations()), np.inf)
        for _ in range(repeats):
            times = library.lb_plan_times(self._plan, 1)
            _raise(library.lb_plan_run(self._plan, 1, item.ctypes.data, y.ctypes.data, 1))
            least = np.minimum(least, np.ctypeslib.as_array(times, (len(least),)))
        library.lb_plan_times(self._plan, 0)
        return least

    def _run_numpy(self, x: np.ndarray) -> np.ndarray:
        if x.dtype != np.float32 or x.ndim < 1 or x.size != len(x) * self.inputs:
            raise LowbitError(f"x is {x.dtype} {list(x.shape)}; {self._takes()}")
        x = np.ascontiguousarray(x)
        y = np.empty((len(x), self.outputs), np.float32)
        self._call(len(x), x.ctypes.data, y.ctypes.data)
        return y

    def _run_torch(self, x: "torch.Tensor") -> "torch.Tensor":
        import torch

        if not isinstance(x, torch.Tensor):
            raise LowbitError(f"x is a {type(x).__name__}; {self._takes()}")
        if x.dtype != torch.float32 or x.device.type != "cpu" or x.ndim < 1 or x.numel() != len(x) * self.inputs:
            raise LowbitError(f"x is {x.dtype} {list(x.shape)} on {x.device}; {self._takes()}")
        x = x.detach().contiguous()
        y = torch.empty((len(x), self.outputs))
        self._call(len(x), x.data_ptr(), y.data_ptr())
        return y

    def _call(self, batch: int, x: int, y: int) -> None:
        _raise(self._library.lb_plan_run(self._plan, batch, x, y, self.threads))

    def _takes(self) -> str:
        return f"this plan takes float32 [B, ...] on the CPU with {self.inputs} numbers for each item"

    def __repr__(self) -> str:
        ops = len(self.operations())
        return f"Plan({self.inputs} -> {self.outputs} floats, {ops} operations, {len(self.content) / 1e6:.2f} MB)"


def load_plan(path: str | Path, threads: int | None = None) -> Plan:
    """Load a plan from a file that `Plan.save` wrote. The whole file is checked before it is used.

    Raises:
        LowbitError: the file cannot be read, or is not a plan.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise LowbitError(f"{path} cannot be read: {error.strerror}") from None
    try:
        return Plan(content, threads)
    except LowbitError as error:
        raise LowbitError(f"{path}: {error}") from None


def _cores() -> int:
    """Number of cores that this process may use; on macOS, which does not tell, all cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    size = ctypes.c_int64
    library.lb_plan_load.argtypes = [ctypes.c_char_p, size, ctypes.c_void_p, ctypes.c_char_p, size]
    library.lb_plan_run.argtypes = [ctypes.c_void_p, size, ctypes.c_void_p, ctypes.c_void_p, size]
    library.lb_plan_free.argtypes = [ctypes.c_void_p]
    library.lb_plan_free.restype = None
    library.lb_plan_times.argtypes = [ctypes.c_void_p, ctypes.c_int]
    library.lb_plan_times.restype = ctypes.POINTER(ctypes.c_double)
    return library


def _raise(status: int) -> None:
    if status == _NO_MEMORY:
        raise MemoryError("there is not enough memory to run the plan")
    if status:
        raise RuntimeError(f"the plan could not be run ({status})")
