"""Embed a batch of any size in memory of a fixed size (GradCache, Gao et al. 2021). Pure torch.

S sequences of one worker (queries, then passages), D dimensions. The embeddings are leaves to the loss; their
gradients are then pushed through the encoder chunk by chunk:

1. the whole batch fits the token budget: one forward per length group with the graph kept, one backward through all;
2. otherwise: forward without a graph, then forward again with it and backward, one chunk at a time. The second
   forward replays the random state of the first, so dropout draws the same masks.

The gradient is the same either way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdro_ray.retrieval.chunks import Ints, length_chunks, padded_tokens

LENGTH_GROUPS = (
    4  # forwards that a batch within the budget is split into, so that short texts are not padded to long ones
)


def plan_chunks(length_S: Ints, graph_tokens: int, chunk_tokens: int, packed: bool = False) -> tuple[list[Ints], bool]:
    """Return (chunks, whether one pass is taken: the graph of all chunks is at most `graph_tokens` padded tokens).

    A chunk holds at most `chunk_tokens` padded tokens. `packed` sequences have no padding to be grouped for.
    """
    most = chunk_tokens if packed else min(graph_tokens // LENGTH_GROUPS, chunk_tokens)
    groups = length_chunks(length_S, max(1, most), packed)
    if padded_tokens(length_S, groups, packed) <= graph_tokens:
        return groups, True
    return length_chunks(length_S, chunk_tokens, packed), False


@dataclass
class CachedForward:
    """One batch on its way through the encoder: `forward()`, a loss on the result, `backward(gradient)`.

    `run(chunk) -> (len(chunk), D)` encodes the sequences at the given indices. `num_chunks` may exceed this worker's
    own chunks: sharded backends need the same number of forwards everywhere, the surplus runs weigh zero.
    `push(outputs, gradients, last)` is one backward; a backend that reduces gradients in hooks does so in the last only.
    """

    run: Callable[[Ints], Tensor]
    chunks: list[Ints]
    one_pass: bool
    num_chunks: int
    push: Callable[[list[Tensor], list[Tensor], bool], None] = lambda out, grad, last: torch.autograd.backward(
        out, grad
    )
    _kept: list[Tensor] = field(default_factory=list)
    _random: list[Any] = field(default_factory=list)

    def forward(self) -> Tensor:
        """Return the embeddings of all sequences (S, D), detached, requiring gradients."""
        parts = []
        for chunk in self._padded_chunks():
            if self.one_pass:
                out = self.run(chunk)
                self._kept.append(out)
            else:
                self._random.append(_random_state())
                with torch.no_grad():
                    out = self.run(chunk)
            parts.append(out.detach())
        order = np.concatenate(self.chunks)
        rep_SD = torch.empty((len(order), parts[0].shape[1]), dtype=parts[0].dtype, device=parts[0].device)
        rep_SD[torch.from_numpy(order).to(rep_SD.device)] = torch.cat(parts[: len(self.chunks)])
        return rep_SD.requires_grad_()

    def backward(self, gradient_SD: Tensor) -> None:
        """Add the gradient of ``sum(gradient * embeddings)`` to the parameters."""
        chunks = self._padded_chunks()
        gradients = [gradient_SD[torch.from_numpy(c).to(gradient_SD.device)] for c in self.chunks]
        gradients += [torch.zeros_like(gradients[0][:1]) for _ in chunks[len(self.chunks) :]]
        if self.one_pass:
            self.push(self._kept, gradients, True)
            self._kept.clear()
            return
        for i, (chunk, gradient) in enumerate(zip(chunks, gradients, strict=True)):
            with _replayed(self._random[i]):
                self.push([self.run(chunk)], [gradient], i == len(chunks) - 1)
        self._random.clear()

    def _padded_chunks(self) -> list[Ints]:
        shortest = self.chunks[-1][-1:]
        return self.chunks + [shortest] * (self.num_chunks - len(self.chunks))


def _random_state() -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


class _replayed:
    """Run under a saved random state, and put the present one back."""

    def __init__(self, state: tuple[Tensor, Tensor | None]) -> None:
        self.state = state

    def __enter__(self) -> None:
        self.before = _random_state()
        _set_random_state(self.state)

    def __exit__(self, *_: object) -> None:
        _set_random_state(self.before)


def _set_random_state(state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
