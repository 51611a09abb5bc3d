"""How parameters and gradients are laid over the workers. One class and one line in `BACKENDS` per backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from tdro_ray.config import ScaleSettings, TrainSettings
from tdro_ray.train.comm import sum_
from tdro_ray.train.deepspeed_zero import Zero
from tdro_ray.train.fsdp import FullyShard
from tdro_ray.train.optimizer import (
    MakeOptimizer,
    adamw,
    master_weights,
    parameter_groups,
    read_state,
    trained_parameters,
    write_state,
)


class Backend(Protocol):
    """One optimiser step over a module that may be sharded. Gradients are *summed* over workers: the loss is a share
    of a global mean."""

    module: nn.Module  # call this one; its parameters may be shards

    def backward(self, outputs: list[Tensor], gradients: list[Tensor], last: bool) -> None:
        """Add the gradient of ``sum(gradient * output)`` to the parameters; `last` is the step's last call."""
        ...

    def update(self, learning_rate: float) -> float:
        """Reduce gradients, clip, step; return the gradient's 2-norm before clipping."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Whole trainable parameters and optimiser state by name (see `read_state`); called by all ranks, whole on rank 0."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what any backend's `state_dict` gave, on any number of workers; every rank passes the whole of it."""
        ...


class Replicated:
    """A copy of the model on every worker, one gradient all-reduce per step (what DDP does under `no_sync` for all
    but the last backward, without its hooks, which several forwards per backward would confuse)."""

    def __init__(
        self,
        module: nn.Module,
        settings: TrainSettings,
        scale: ScaleSettings | None = None,
        device: torch.device | None = None,
        make_optimizer: MakeOptimizer = adamw,
    ) -> None:
        self.module, self.settings = module.to(device), settings
        self.trained = trained_parameters(module)
        self.masters = master_weights(self.trained)
        self.parameters = list(self.masters.values())
        self.optimizer = make_optimizer(parameter_groups(self.masters, settings.weight_decay), settings.learning_rate)

    def backward(self, outputs: list[Tensor], gradients: list[Tensor], last: bool) -> None:
        torch.autograd.backward(outputs, gradients)

    def update(self, learning_rate: float) -> float:
        gradients = [
            p.grad if p.grad is not None else torch.zeros_like(master)
            for p, master in zip(self.trained.values(), self.parameters, strict=True)
        ]
        flat = sum_(_flatten_dense_tensors(gradients))
        for master, g in zip(self.parameters, _unflatten_dense_tensors(flat, gradients), strict=True):
            master.grad = g
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._round()
        return float(norm)

    def state_dict(self) -> dict[str, Any]:
        return read_state(self.masters, self.optimizer, lambda tensor: tensor)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        write_state(self.masters, self.optimizer, state, lambda whole, like: whole.to(like.device, copy=True))
        self._round()

    @torch.no_grad()
    def _round(self) -> None:
        """Bring the module's 16-bit parameters up to their masters, and drop the gradients that were theirs."""
        for p, master in zip(self.trained.values(), self.parameters, strict=True):
            if p is not master:
                p.copy_(master)
                p.grad = None


BACKENDS: dict[str, Callable[..., Backend]] = {
    "ddp": Replicated,
    "fsdp": FullyShard,
    "zero1": Zero,
    "zero2": Zero,
    "zero3": Zero,
}
