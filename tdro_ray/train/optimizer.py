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


def parameter_groups(module: nn.Module, weight_decay: float) -> Groups:
    """Return the optimiser's groups: matrices decay, vectors (norms, biases) do not."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def read_state(
    module: nn.Module, optimizer: torch.optim.Optimizer, whole: Callable[[Tensor], Tensor | None]
) -> dict[str, Any]:
    """Return {"parameters": {name: tensor}, "optimizer": {name: {key: tensor}}}.

    `whole(tensor)` makes a shard whole; None says that this worker does not keep it.
    """
    parameters, states = {}, {}
    for name, p in trained_parameters(module).items():
        parameters[name] = whole(p.detach())
        found = optimizer.state.get(p, {})
        states[name] = {key: whole(value) for key, value in found.items() if isinstance(value, Tensor)}
    return {"parameters": parameters, "optimizer": states}


@torch.no_grad()
def write_state(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    own_share: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Put what `read_state` returned into the module and the optimiser. `own_share(whole, like)` cuts a parameter's shard."""
    for name, p in trained_parameters(module).items():
        p.copy_(own_share(state["parameters"][name], p))
        optimizer.state[p] = {
            key: own_share(value, p) if value.shape == p.shape else value.to(p.device, copy=True)
            for key, value in state["optimizer"][name].items()
        }
