"""Collectives over row-wise tensors, whatever each worker's number of rows. One process without a group is a world of one.

N rows of the global batch in rank order, B rows of this worker.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> tuple[int, int]:
    """Return (rank, number of workers)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def alone(device: torch.device) -> None:
    """Make this process a group of one where it is in none: sharding backends need a group."""
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def gather_rows(local_B: Tensor, sizes: list[int] | None = None) -> Tensor:
    """Return all workers' rows in rank order: (N, …). No gradient flows through it.

    `sizes` are the workers' numbers of rows where they are known; otherwise they are exchanged first.
    """
    _rank, count = world()
    if count == 1:
        return local_B
    sizes = sizes or gather_sizes(len(local_B), local_B.device)
    most = max(sizes)
    padded = local_B.new_zeros((most, *local_B.shape[1:]))
    padded[: len(local_B)] = local_B
    parts = [torch.empty_like(padded) for _ in range(count)]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def gather_sizes(size: int, device: torch.device) -> list[int]:
    """Return every worker's `size`, in rank order."""
    _, count = world()
    if count == 1:
        return [size]
    parts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(count)]
    dist.all_gather(parts, torch.tensor([size], dtype=torch.int64, device=device))
    return [int(p.item()) for p in parts]


def sum_(tensor: Tensor) -> Tensor:
    """Add the workers' tensors in place and return the sum."""
    if world()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def of_first(value: int, device: torch.device) -> int:
    """Return rank 0's value."""
    if world()[1] == 1:
        return value
    held = torch.tensor([value], dtype=torch.int64, device=device)
    dist.broadcast(held, 0)
    return int(held.item())


def largest(value: int, device: torch.device) -> int:
    """Return the largest of the workers' values."""
    return max(gather_sizes(value, device))
