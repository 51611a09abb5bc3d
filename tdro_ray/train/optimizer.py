"""The optimiser that all backends step, and its state by parameter name, so that any backend reads what any other wrote."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Groups = list[dict[str, Any]]
MakeOptimizer = Callable[[Groups, float], torch.optim.Optimizer]


def adamw(groups: Groups, learning_rate: float) -> torch.optim.Optimizer:
    """Return AdamW over the groups."""
    return torch.optim.AdamW(groups, lr=learning_rate, fused=True)


def parameter_groups(trained: dict[str, nn.Parameter], weight_decay: float) -> Groups:
    """Return the optimiser's groups: matrices decay, vectors (norms, biases) do not."""
    groups = [
        {"params": [p for p in trained.values() if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained.values() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def master_weights(trained: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return float32 copies of the 16-bit parameters, others as they are.

    bfloat16 has 8 bits of precision: an update of less than 1/256 of a weight, most of them at usual learning rates,
    would be rounded away. Gradients of 16-bit parameters are summed in float32 from here on, over many chunks.
    """
    masters = {}
    for name, p in trained.items():
        masters[name] = p
        if p.dtype in (torch.bfloat16, torch.float16):
            p.grad_dtype = torch.float32
            masters[name] = nn.Parameter(p.detach().float())
    return masters


def read_state(
    trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, whole: Callable[[Tensor], Tensor | None]
) -> dict[str, Any]:
    """Return {"parameters": {name: tensor}, "optimizer": {name: {key: tensor}}} of the parameters that are stepped.

    `whole(tensor)` makes a shard whole; None says that this worker does not keep it.
    """
    parameters, states = {}, {}
    for name, p in trained.items():
        parameters[name] = whole(p.detach())
        found = optimizer.state.get(p, {})
        states[name] = {key: whole(value) for key, value in found.items() if isinstance(value, Tensor)}
    return {"parameters": parameters, "optimizer": states}


@torch.no_grad()
def write_state(
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    own_share: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Put what `read_state` returned into the parameters and the optimiser. `own_share(whole, like)` cuts a parameter's shard."""
    for name, p in trained.items():
        p.copy_(own_share(state["parameters"][name], p))
        optimizer.state[p] = {
            key: own_share(value, p) if value.shape == p.shape else value.to(p.device, copy=True)
            for key, value in state["optimizer"][name].items()
        }
