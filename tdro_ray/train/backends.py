"""How parameters and gradients are laid over the workers. One class and one line in `BACKENDS` per backend."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from tdro_ray.config import TrainSettings
from tdro_ray.train.comm import sum_


class Backend(Protocol):
    """One optimiser step over a module that may be sharded. Gradients are *summed* over workers: the loss is a share
    of a global mean."""

    module: nn.Module

    def sync(self, last: bool) -> AbstractContextManager[Any]:
        """Wrap one backward; `last` is the step's last."""
        ...

    def update(self, learning_rate: float) -> float:
        """Reduce gradients, clip, step; return the gradient's 2-norm before clipping."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Whole trainable parameters and optimiser state, gathered; called by all ranks, used by rank 0."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Replicated:
    """A copy of the model on every worker, one gradient all-reduce per step (what DDP does under `no_sync` for all
    but the last backward, without its hooks, which several forwards per backward would confuse)."""

    def __init__(self, module: nn.Module, settings: TrainSettings) -> None:
        self.module, self.settings = module, settings
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            parameter_groups(module, settings.weight_decay), lr=settings.learning_rate, fused=True
        )

    def sync(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext()

    def update(self, learning_rate: float) -> float:
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        flat = sum_(_flatten_dense_tensors(gradients))
        for p, g in zip(self.parameters, _unflatten_dense_tensors(flat, gradients), strict=True):
            p.grad = g
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def state_dict(self) -> dict[str, Any]:
        trained = {n: p.detach() for n, p in self.module.named_parameters() if p.requires_grad}
        return {"parameters": trained, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        own: dict[str, Tensor] = dict(self.module.named_parameters())
        with torch.no_grad():
            for name, value in state["parameters"].items():
                own[name].copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])


BACKENDS: dict[str, type[Replicated]] = {"ddp": Replicated}


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW groups: matrices decay, vectors (norms, biases) do not."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
