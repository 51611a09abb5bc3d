"""Task weights alpha: the exponentiated-gradient update of tDRO, its schedule, and tests on where alpha went.

Pure torch; knows nothing of Ray, workers or config. Axes: G tasks, N rows of a global batch, S updates.
All state is float64 on the CPU: the log weights of 1,000 updates of 2e-2 pass through softmax and log each time, and
one rounding error more or less must not decide which task is selected.

Sources: tDRO, Ma et al., AAAI 2025, arXiv 2408.10613, section 3.1, and its released code; Group DRO, Sagawa et al.,
ICLR 2020, Algorithm 1; DoReMi, Xie et al., NeurIPS 2023, Algorithm 1 (floor).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from tdro_ray.errors import CheckpointError, ConfigError, TdroError, nearest

Schedule = Literal["constant", "linear", "cosine"]
SCHEDULES = ("constant", "linear", "cosine")


class TaskWeights:
    """Weights of `num_tasks` tasks that follow the signals given to `update`.

        signal <- signal * min(1, clip_norm / ||signal||_2)
        v      <- momentum * v + signal                        (v = signal without momentum)
        alpha  <- softmax(log alpha + eta * v)
        alpha  <- (1 - floor) * alpha + floor / G              (DoReMi's smoothing)

    `eta` may be changed between updates (see `eta_at`). An update with eta = 0 notes the signal for the tasks that
    later batches lack and changes nothing else: no weight, no mean, no EMA. That is how alpha is held while the proxy
    warms up, without the held steps diluting the mean.

    `absent` says what a task without rows in a batch (`present_G` False) contributes: "zero", as in the released
    code, where it loses weight against all others; or "carry", its last signal, and before its first one the mean of
    the known signals, which is neutral.
    """

    def __init__(
        self,
        num_tasks: int,
        eta: float,
        clip_norm: float = 1.0,
        ema: float = 0.1,
        floor: float = 0.0,
        initial: Tensor | None = None,
        absent: Literal["zero", "carry"] = "carry",
        momentum: float = 0.0,
    ) -> None:
        if num_tasks < 1:
            raise ConfigError(f"TaskWeights needs at least one task, got num_tasks={num_tasks}.")
        if absent not in ("zero", "carry"):
            raise ConfigError(f"absent={absent!r} is not valid.{nearest(absent, ('zero', 'carry'))}")
        if not 0 <= floor < 1:
            raise ConfigError(f"floor={floor} is not valid: it is the share of weight spread evenly, 0 <= floor < 1.")
        self.num_tasks, self.eta, self.clip_norm, self.ema = num_tasks, eta, clip_norm, ema
        self.floor, self.absent, self.momentum = floor, absent, momentum
        self.num_updates = 0  # updates with eta > 0
        self.log_alpha_G = _initial_alpha(num_tasks, initial).log()
        self.signal_G = torch.zeros(
            num_tasks, dtype=torch.float64
        )  # last used, before clipping; absent tasks filled in
        self._sum_G = torch.zeros(num_tasks, dtype=torch.float64)
        self._ema_G = self.log_alpha_G.exp()
        self._velocity_G = torch.zeros(num_tasks, dtype=torch.float64)
        self._seen_G = torch.zeros(num_tasks, dtype=torch.bool)

    @property
    def alpha_G(self) -> Tensor:
        """Current weights, float64, sum 1."""
        return self.log_alpha_G.exp()

    @property
    def mean_G(self) -> Tensor:
        """Mean of the weights after each update, the initial value left out; the initial value before any update."""
        return self._sum_G / self.num_updates if self.num_updates else self.alpha_G

    @property
    def ema_G(self) -> Tensor:
        """Exponential moving average: ema <- (1 - factor) * ema + factor * alpha, from the initial weights."""
        return self._ema_G.clone()

    def update(self, signal_G: Tensor, present_G: Tensor | None = None) -> Tensor:
        """Move the weights along one signal per task and return the new `alpha_G`.

        `present_G` (bool) says which tasks the batch held; None: all. Raises TdroError when the signal of a present
        task is not finite; the weights are then unchanged.
        """
        present_G = (
            torch.ones(self.num_tasks, dtype=torch.bool) if present_G is None else present_G.detach().cpu().bool()
        )
        signal_G = self._fill_absent(signal_G.detach().cpu().double(), present_G)
        self.signal_G, self._seen_G = signal_G, self._seen_G | present_G
        if self.eta == 0:
            return self.alpha_G
        norm = float(signal_G.norm())
        clipped_G = signal_G * (self.clip_norm / norm) if norm > self.clip_norm else signal_G
        self._velocity_G = self.momentum * self._velocity_G + clipped_G
        alpha_G = torch.softmax(self.log_alpha_G + self.eta * self._velocity_G, dim=0)
        if self.floor:
            alpha_G = (1 - self.floor) * alpha_G + self.floor / self.num_tasks
        # A weight that underflows to 0 could never come back: log 0 is -inf.
        self.log_alpha_G = alpha_G.clamp(min=torch.finfo(torch.float64).tiny).log()
        self.num_updates += 1
        self._sum_G = self._sum_G + alpha_G
        self._ema_G = (1 - self.ema) * self._ema_G + self.ema * alpha_G
        return self.alpha_G

    def _fill_absent(self, signal_G: Tensor, present_G: Tensor) -> Tensor:
        if signal_G.shape != (self.num_tasks,) or present_G.shape != (self.num_tasks,):
            raise ValueError(
                f"update needs {self.num_tasks} signals, got {tuple(signal_G.shape)} and present_G {tuple(present_G.shape)}."
            )
        bad = torch.nonzero(~torch.isfinite(signal_G) & present_G).flatten().tolist()
        if bad:
            raise TdroError(
                f"The signal of task number {', '.join(map(str, bad[:8]))} is not finite ({signal_G[bad[0]].item()}) after "
                f"{self.num_updates} updates: the proxy's or the reference's loss is NaN or infinite there. "
                "Lower the learning rate, raise the temperature, or look at those tasks' rows."
            )
        if self.absent == "zero":
            return torch.where(present_G, signal_G, 0.0)
        known_G = present_G | self._seen_G
        filled_G = torch.where(present_G, signal_G, self.signal_G)
        if known_G.any() and not known_G.all():
            filled_G = torch.where(known_G, filled_G, filled_G[known_G].mean())
        return filled_G

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a run needs to go on exactly: tensors and one int. Settings are the constructor's."""
        return {
            "log_alpha": self.log_alpha_G.clone(),
            "signal": self.signal_G.clone(),
            "seen": self._seen_G.clone(),
            "sum": self._sum_G.clone(),
            "ema": self._ema_G.clone(),
            "velocity": self._velocity_G.clone(),
            "num_updates": self.num_updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state. Raises CheckpointError when it is for another number of tasks or lacks a field."""
        missing = sorted(set(self.state_dict()) - set(state))
        if missing:
            raise CheckpointError(
                f"The state of the task weights lacks {', '.join(missing)}. Start stage 1 anew, or give a whole checkpoint."
            )
        if len(state["log_alpha"]) != self.num_tasks:
            raise CheckpointError(
                f"The checkpoint holds weights of {len(state['log_alpha'])} tasks, this run has {self.num_tasks}. "
                "Start stage 1 anew when the set of tasks has changed."
            )
        self.log_alpha_G, self.signal_G = _double(state["log_alpha"]), _double(state["signal"])
        self._sum_G, self._ema_G, self._velocity_G = (_double(state[k]) for k in ("sum", "ema", "velocity"))
        self._seen_G = torch.as_tensor(state["seen"]).cpu().bool().clone()
        self.num_updates = int(state["num_updates"])


def _double(value: Any) -> Tensor:
    return torch.as_tensor(value).detach().cpu().double().clone()


def _initial_alpha(num_tasks: int, initial: Tensor | None) -> Tensor:
    if initial is None:
        return torch.full((num_tasks,), 1 / num_tasks, dtype=torch.float64)
    alpha_G = _double(initial)
    if alpha_G.shape != (num_tasks,) or not torch.isfinite(alpha_G).all() or (alpha_G <= 0).any():
        raise ConfigError(
            f"initial must hold {num_tasks} finite weights above 0 (a weight of 0 can never grow), got {alpha_G.tolist()}."
        )
    return alpha_G / alpha_G.sum()


def row_weights(alpha_G: Tensor, task_N: Tensor, task_all: Tensor | None = None) -> Tensor:
    """Return each row's weight in the proxy's loss (N,): alpha_g(i) / sum_j alpha_g(j), sum 1 over the global batch.

    `task_all` holds the tasks of the whole global batch where `task_N` is one worker's part of it, so that the sum of
    the workers' losses does not depend on their number. The robust loss is sum_i weight_i * L_proxy,i with alpha
    *after* the step's update (released code).
    """
    alpha_G = alpha_G.to(task_N.device)
    return alpha_G[task_N] / alpha_G[task_N if task_all is None else task_all].sum()


def eta_at(step: int, steps: int, eta: float, schedule: Schedule = "constant", hold: float = 0.0) -> float:
    """Return the step size on log alpha at `step` (0-based) of `steps`; 0 while alpha is held.

    The first `hold` share of the steps is held: L_proxy / L_ref of an untrained proxy is about const / L_ref and says
    nothing of what the task needs. After that, with t in [0, 1) the share of the rest that is done,

        constant: eta      linear: eta * (1 - t)      cosine: eta * (1 + cos(pi t)) / 2
    """
    if schedule not in SCHEDULES:
        raise ConfigError(f"No eta schedule {schedule!r}.{nearest(schedule, SCHEDULES)}")
    if not 0 <= hold < 1:
        raise ConfigError(
            f"hold={hold} is not valid: it is the share of steps during which alpha is held, 0 <= hold < 1."
        )
    held = math.floor(steps * hold + 1e-9)
    if step < held:
        return 0.0
    t = (step - held) / max(1, steps - held)
    return {"constant": eta, "linear": eta * (1 - t), "cosine": eta * (1 + math.cos(math.pi * t)) / 2}[schedule]


def effective_tasks(alpha_G: Tensor) -> float:
    """Return exp(H(alpha)), the number of equally weighted tasks with the same entropy: 1 (one task) to G (uniform)."""
    alpha_G = alpha_G.double() / alpha_G.double().sum()
    return math.exp(float(torch.special.entr(alpha_G).sum()))


def collapsed(alpha_G: Tensor, least: float = 0.1) -> bool:
    """Whether alpha nears one task: (effective tasks - 1) / (G - 1) below `least`. Never with a single task."""
    num_tasks = len(alpha_G)
    return num_tasks > 1 and (effective_tasks(alpha_G) - 1) / (num_tasks - 1) < least


def tail_mean(alpha_SG: Tensor, share: float = 0.5) -> Tensor:
    """Return the mean weights over the last `share` of the trajectory (G,), at least one update; sum 1.

    The running mean of the released code gives the untrained proxy's weights as much say as the trained one's.
    """
    count = max(1, math.ceil(len(alpha_SG) * share - 1e-9))
    return alpha_SG[-count:].double().mean(dim=0)


def weight_shift(alpha_SG: Tensor, window: int) -> float:
    """Return how far the weights moved: total variation between the means of the last two windows, in [0, 1].

    Infinite while the trajectory is shorter than two windows. The running mean is no measure of this: it moves less
    and less by arithmetic alone, 1/S a step, however fast alpha itself still goes.
    """
    if len(alpha_SG) < 2 * window:
        return math.inf
    recent_G, before_G = alpha_SG[-window:].double().mean(0), alpha_SG[-2 * window : -window].double().mean(0)
    return float((recent_G - before_G).abs().sum() / 2)


def converged(trajectory: Tensor, tolerance: float, window: int) -> bool:
    """Whether the mean weights (S, G) of the last `window` updates moved less than `tolerance` from the window before.

    `tolerance` is a share of the total weight: 0.01 means that less than 1 % of the sampling changed hands.
    """
    return weight_shift(trajectory, window) < tolerance
