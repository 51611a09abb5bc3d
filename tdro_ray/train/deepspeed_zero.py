"""DeepSpeed's ZeRO: stage 1 shards the optimiser state, 2 the gradients too, 3 the parameters too."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tdro_ray.config import ScaleSettings, TrainSettings
from tdro_ray.errors import ResourceError
from tdro_ray.train.comm import alone, world
from tdro_ray.train.optimizer import MakeOptimizer, adamw, parameter_groups, trained_parameters

BUCKET = 50_000_000  # elements reduced or gathered at a time, at most; DeepSpeed's own 500 M would take 2 GB a buffer


class Zero:
    """A DeepSpeed engine, stepped once per step. Stages 2 and 3 reduce after every backward, so that no worker ever
    holds a whole gradient; stage 1 reduces at the step's last backward only."""

    def __init__(
        self,
        module: nn.Module,
        settings: TrainSettings,
        scale: ScaleSettings | None = None,
        device: torch.device | None = None,
        make_optimizer: MakeOptimizer = adamw,
    ) -> None:
        deepspeed = _deepspeed()
        scale, device = scale or ScaleSettings(backend="zero3"), device or torch.device("cpu")
        alone(device)
        os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # DeepSpeed asks for it; Ray Train sets it
        self.stage = int(scale.backend[-1])
        self.trained = trained_parameters(module)
        dtype = next(module.parameters()).dtype
        self.engine, *_ = deepspeed.initialize(
            model=module.to(device),
            optimizer=make_optimizer(parameter_groups(self.trained, settings.weight_decay), settings.learning_rate),
            config=engine_config(settings, scale, dtype, sum(p.numel() for p in module.parameters())),
            dist_init_required=False,
        )
        self.module = self.engine

    def backward(self, outputs: list[Tensor], gradients: list[Tensor], last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        count = world()[1]  # the engine averages over workers, the protocol sums
        loss = torch.stack([(o * (g * count)).sum() for o, g in zip(outputs, gradients, strict=True)]).sum()
        self.engine.backward(loss)

    def update(self, learning_rate: float) -> float:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def state_dict(self) -> dict[str, Any]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        parameters, states = {}, {}
        self._link_states()
        first = self._flat_states()[0]
        for name, p in self.trained.items():
            parameters[name] = _kept(safe_get_full_fp32_param(p))
            states[name] = {
                key: _kept(safe_get_full_optimizer_state(p, key) if value.ndim else value.clone())
                for key, value in first.items()
                if isinstance(value, Tensor)
            }
        return {"parameters": parameters, "optimizer": states}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        self._make_states(state["optimizer"])
        for name, p in self.trained.items():
            self._set_parameter(p, state["parameters"][name])
            for key, value in state["optimizer"][name].items():
                if value.ndim == 0 and p.ndim:
                    continue  # the step, one for a whole group: made above
                value = value.to(p.device, torch.float32)
                if self.stage == 3:
                    safe_set_local_optimizer_state(p, _own_share(value, p), key)
                else:
                    safe_set_full_optimizer_state(p, value, key)

    def _flat_partitions(self) -> list[Tensor]:
        """This worker's partition of each group: what the inner optimiser steps."""
        zero = self.engine.optimizer
        return list(zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups)

    def _flat_states(self) -> list[dict[str, Any]]:
        return [self.engine.optimizer.optimizer.state.get(flat, {}) for flat in self._flat_partitions()]

    def _make_states(self, states: dict[str, dict[str, Tensor]]) -> None:
        """Make the inner optimiser's state, which it would make at its first step, in the shapes of its partitions."""
        zero, one = self.engine.optimizer, next(iter(states.values()))
        if not one:
            return
        for flat in self._flat_partitions():
            zero.optimizer.state[flat] = {
                key: torch.zeros_like(flat) if value.ndim else value.to(flat.device, copy=True)
                for key, value in one.items()
            }
        self._link_states()

    def _link_states(self) -> None:
        """Let each parameter know its piece of the state. DeepSpeed does so after the first group's first step, when
        the other groups have no state yet."""
        if self.stage < 3:
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _set_parameter(self, p: nn.Parameter, value: Tensor) -> None:
        """Set the copy that computes and the float32 copy that is stepped."""
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        if self.stage == 3:
            with deepspeed.zero.GatheredParameters([p], modifier_rank=0):
                if world()[0] == 0:
                    p.copy_(value)
            safe_set_local_fp32_param(p, _own_share(value.to(p.device, torch.float32), p))
        else:
            p.copy_(value)
            safe_set_full_fp32_param(p, value.to(p.device, torch.float32))


def engine_config(
    settings: TrainSettings, scale: ScaleSettings, dtype: torch.dtype, num_parameters: int
) -> dict[str, Any]:
    """Return DeepSpeed's configuration: ours, then `scale.deepspeed` over it."""
    bucket = min(BUCKET, max(1, num_parameters))
    zero: dict[str, Any] = {
        "stage": int(scale.backend[-1]),
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if scale.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": scale.use_gpu}
    if scale.offload == "parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": scale.use_gpu}
    ours = {
        "train_micro_batch_size_per_gpu": 1,  # not read: batches are ours
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
    return _merged(ours, scale.deepspeed)


def _merged(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    both = {k: _merged(ours[k], v) for k, v in theirs.items() if isinstance(v, dict) and isinstance(ours.get(k), dict)}
    return {**ours, **theirs, **both}


def _deepspeed() -> Any:
    try:
        import deepspeed
    except ImportError as err:
        raise ResourceError(
            "The zero backends need DeepSpeed, which is not installed here. Install tdro-ray[train], or set scale.backend to fsdp or ddp."
        ) from err
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # importing it sets the level
    # DeepSpeed calls collectives by their old names, at every step.
    warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated", category=FutureWarning)
    return deepspeed


def _kept(tensor: Tensor) -> Tensor | None:
    return tensor.cpu() if dist.get_rank() == 0 else None


def _own_share(whole: Tensor, p: Any) -> Tensor:
    """Cut this worker's partition out of a whole stage-3 tensor; the last one is padded with zeros."""
    size, rank = p.ds_tensor.ds_numel, dist.get_rank()
    part = whole.flatten()[size * rank : size * (rank + 1)]
    return torch.nn.functional.pad(part, (0, size - len(part)))
