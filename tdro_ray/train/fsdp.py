"""FSDP2: parameters, gradients and optimiser state in shards, one unit per transformer block and one for the rest."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tdro_ray.config import ScaleSettings, TrainSettings
from tdro_ray.train.comm import alone, world
from tdro_ray.train.optimizer import MakeOptimizer, adamw, parameter_groups, read_state, trained_parameters, write_state


class FullyShard:
    """A block's parameters are whole only while it runs. Gradients stay whole on each worker until the step's last
    backward and are then reduced once (GradCache runs many): memory of one whole gradient for one reduction a step."""

    def __init__(
        self,
        module: nn.Module,
        settings: TrainSettings,
        scale: ScaleSettings | None = None,
        device: torch.device | None = None,
        make_optimizer: MakeOptimizer = adamw,
    ) -> None:
        device = device or torch.device("cpu")
        alone(device)
        mesh = init_device_mesh(device.type, (world()[1],))
        # Block by block: a model that does not fit a device whole is moved there in shards.
        policy = _float32_shards(module)
        for block in [*transformer_blocks(module), module]:
            fully_shard(block, mesh=mesh, mp_policy=policy)
            assert isinstance(block, FSDPModule)
            block.set_gradient_divide_factor(1.0)  # the protocol sums gradients, FSDP averages them
            block.set_force_sum_reduction_for_comms(True)
        module.to(device)  # what is no parameter
        self.module, self.settings = module, settings
        self.trained = trained_parameters(module)
        self.parameters = list(self.trained.values())
        self.optimizer = make_optimizer(parameter_groups(self.trained, settings.weight_decay), settings.learning_rate)

    def backward(self, outputs: list[Tensor], gradients: list[Tensor], last: bool) -> None:
        assert isinstance(self.module, FSDPModule)
        self.module.set_requires_gradient_sync(last)
        torch.autograd.backward(outputs, gradients)

    def update(self, learning_rate: float) -> float:
        for p in self.parameters:
            if p.grad is None:  # unused ones too decay, as under the other backends
                p.grad = torch.zeros_like(p)
        norm: Any = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm.full_tensor())

    def state_dict(self) -> dict[str, Any]:
        return read_state(self.trained, self.optimizer, _whole)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        write_state(self.trained, self.optimizer, state, _own_share)


def transformer_blocks(module: nn.Module) -> list[nn.Module]:
    """Return the layers of the backbone: the elements of its largest `ModuleList`. Empty where it has none."""
    lists = [m for m in module.modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        return []
    return list(max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters())))


def _float32_shards(module: nn.Module) -> MixedPrecisionPolicy:
    """Bring trained 16-bit weights to float32, of which each worker keeps its shard (see `optimizer.master_weights`),
    and return the policy that computes in their 16 bits and sums gradients in float32."""
    low = {p.dtype for p in trained_parameters(module).values()} & {torch.bfloat16, torch.float16}
    if not low:
        return MixedPrecisionPolicy()
    module.float()
    # The vectors stay float32 as they come out: a temperature of 0.002 needs them.
    return MixedPrecisionPolicy(param_dtype=low.pop(), reduce_dtype=torch.float32)


def _whole(tensor: Tensor) -> Tensor | None:
    """Gather a shard; only rank 0 keeps it, in host memory."""
    found = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return found.cpu() if dist.get_rank() == 0 else None


def _own_share(whole: Tensor, like: Tensor) -> Tensor:
    assert isinstance(like, DTensor)
    # Every rank has the whole tensor: each cuts its own share, nothing is sent.
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
