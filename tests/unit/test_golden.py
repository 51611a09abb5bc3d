"""Our measures and update against the released code, step by step."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from tdro_ray.dro.measures import MEASURES, task_counts
from tdro_ray.dro.weights import TaskWeights, row_weights

SHARED = Path(os.environ.get("TDRO_SHARED") or Path(__file__).parents[2].parent / "shared")
GOLDEN = SHARED / "reference" / "golden_official.json"


@pytest.mark.skipif(not GOLDEN.exists(), reason=f"no {GOLDEN}; set TDRO_SHARED to the folder that holds reference/")
@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("say_present", [False, True])
def test_every_step_of_the_released_code_is_reproduced(index: int, say_present: bool) -> None:
    run = json.loads(GOLDEN.read_text())[index]
    num_tasks = run["num_tasks"]
    options = {"p_norm": run["p_norm"]} if run["measure"] == "official" else {}
    weights = TaskWeights(num_tasks, run["eta"], clip_norm=run["clip_norm"], absent="zero")
    for step in run["steps"]:
        task_N, proxy_loss_N = torch.tensor(step["task"]), torch.tensor(step["proxy_loss"])
        signal_G = MEASURES[run["measure"]](
            proxy_loss_N, torch.tensor(step["reference_loss"]), task_N, num_tasks, **options
        )
        weights.update(signal_G, task_counts(task_N, num_tasks) > 0 if say_present else None)
        robust_loss = (row_weights(weights.alpha_G, task_N) * proxy_loss_N).sum()

        # atol: a difference of two losses, each rounded to six decimals, is off by up to 1e-6
        _close(signal_G, step["signal"], rtol=1e-4, atol=1e-6)
        _close(weights.alpha_G, step["weights"])
        _close(weights.mean_G, step["weights_mean"])
        _close(weights.ema_G, step["weights_ema"])
        _close(robust_loss, step["robust_loss"])


def _close(ours: torch.Tensor, theirs: list[float] | float, rtol: float = 0, atol: float = 1e-5) -> None:
    torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64), rtol=rtol, atol=atol)
