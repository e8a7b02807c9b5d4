"""More than one process: ``torchrun`` starts them, DistributedDataParallel joins their gradients.

Batch statistics stay per process (SyncBatchNorm needs GPUs), so only models without BatchNorm agree with a
one-process run. Evaluation and checkpoints use the running statistics of process 0.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lowbit.errors import LowbitError


@dataclass(frozen=True)
class Processes:
    """This process among its peers: ``rank`` of ``count``, computing on ``device``."""

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def share(self, batch_size: int) -> int:
        """Items of a global batch that this process handles."""
        return batch_size // self.count

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over processes of a tensor, in place."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """The plain ``value`` of every process, in order of rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model whose backward pass averages gradients over processes."""
        if self.count == 1 or not any(parameter.requires_grad for parameter in model.parameters()):
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=devices)

    def same_buffers(self, model: nn.Module) -> None:
        """Give every process the buffers (running statistics) of process 0."""
        if self.count > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def wait(self) -> None:
        """Wait for the other processes."""
        if self.count > 1:
            dist.barrier()


@contextmanager
def processes(device: str | torch.device | None = None) -> Iterator[Processes]:
    """Join the processes that ``torchrun`` started, by its environment variables, or run as the only process.

    Args:
        device: e.g. "cpu" (backend gloo) or "cuda" (backend nccl); None takes this rank's GPU if there is one, else the
            CPU.

    Raises:
        LowbitError: there is no such device, or the environment variables of ``torchrun`` are wrong or incomplete.
    """
    count = _number("WORLD_SIZE", 1)
    if device is None:
        local = _number("LOCAL_RANK", 0)
        device = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError:
        raise LowbitError(f"device={device!r} is not allowed; use 'cpu', 'cuda' or 'cuda:<number>'") from None
    if device.type not in ("cpu", "cuda"):
        raise LowbitError(f"device={str(device)!r} is not allowed; use 'cpu', 'cuda' or 'cuda:<number>'")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise LowbitError(f"device={str(device)!r} was asked for, but torch sees no GPU here; use device='cpu'")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise LowbitError(
                f"device={str(device)!r} does not exist; torch sees {torch.cuda.device_count()} GPU(s), numbered from 0"
            )
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        torch.cuda.set_device(device)
    if count == 1:
        yield Processes(0, 1, device)
        return
    ours = not dist.is_initialized()
    if ours:
        if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
            raise LowbitError(
                f"WORLD_SIZE={count} asks for {count} processes, but {missing[0]} is not set: start them with torchrun "
                "--nproc-per-node=N -m lowbit train, or unset WORLD_SIZE"
            )
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), device)
    finally:
        if ours:
            dist.destroy_process_group()


def _number(name: str, default: int) -> int:
    """A number that ``torchrun`` passes in the environment."""
    given = os.environ.get(name) or str(default)
    if not given.isdecimal() or int(given) < default:
        raise LowbitError(
            f"the environment variable {name}={given!r} should be an integer of {default} or more; unset it"
        )
    return int(given)
