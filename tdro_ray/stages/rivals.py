"""Every mixture that a run can fine-tune with, by name: learned ones, and the rivals that they are compared with.

    current, mean, ema, tail, top70, rows70, tokens70    of the recipe's own stage 1
    uniform, proportional, n^0.5                         of the tasks' rows alone
    ratio, official, excess, plain, log_ratio            of a stage 1 by that measure as published
    group_dro                                            uniform sampling, losses scaled by online Group DRO
    NAME.top70                                           another weight file of the stage 1 of rival NAME
    FILE.json                                            a weight file

A recipe adds its own under `rivals`. A new built-in one is a line in `RIVALS`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdro_ray.config import OptimizeSettings, Recipe, RivalSettings, TrainSettings, changed
from tdro_ray.errors import ConfigError, nearest

# What the papers leave out of stage 1: a rival under its published name has none of our options.
PUBLISHED: dict[str, Any] = {
    "measure_options": {},
    "rows": "seen",
    "start": 0.0,
    "hold": 0.0,
    "floor": 0.0,
    "momentum": 0.0,
    "size_c": 0.0,
    "tolerance": 0.0,
    "clip": 1.0,
    "eta_schedule": "constant",
    "absent": "carry",
}
RIVALS: dict[str, RivalSettings] = {
    "uniform": RivalSettings(power=0.0),
    "proportional": RivalSettings(power=1.0),
    "group_dro": RivalSettings(power=0.0, finetune={"group_dro": 0.01}),  # Sagawa et al. 2020, their eta
    "ratio": RivalSettings(optimize={**PUBLISHED, "measure": "ratio"}),  # tDRO, the paper
    "official": RivalSettings(optimize={**PUBLISHED, "measure": "official", "absent": "zero"}),  # tDRO, released code
    "excess": RivalSettings(optimize={**PUBLISHED, "measure": "excess", "floor": 1e-3}),  # DoReMi
    "plain": RivalSettings(optimize={**PUBLISHED, "measure": "plain"}),  # Group DRO's loss in stage 1
    "log_ratio": RivalSettings(optimize={**PUBLISHED, "measure": "log_ratio"}),
}
COMPARED = ("proportional", "n^0.5", "group_dro", "excess", "official", "official.top70", "ratio", "ratio.top70")
POWER = re.compile(r"n\^(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class Mixture:
    """A way to fine-tune. `name` names its stage, its model and its results."""

    name: str
    settings: RivalSettings
    stage1: str | None = None  # stage that learns it: "optimize", "optimize-<rival>"; None: needs none
    file: Path | None = None  # a weight file given by the user

    def weight_file(self, folder: Path) -> Path:
        """Where stage 1 writes these weights, under the run's folder."""
        assert self.stage1 is not None
        return folder / "weights" / f"{prefix(self.stage1)}{self.settings.weights}.json"


def prefix(stage1: str) -> str:
    """What the weight files of a stage 1 start with: nothing for the recipe's own."""
    return stage1.removeprefix("optimize").removeprefix("-") + "." if stage1 != "optimize" else ""


def learned_names(settings: OptimizeSettings) -> list[str]:
    """Weight files that a stage 1 writes."""
    selected = [
        f"{kind}{percent}"
        for kind, percents in {
            "top": settings.top_percent,
            "rows": settings.top_rows,
            "tokens": settings.top_tokens,
        }.items()
        for percent in percents
    ]
    return ["current", "mean", "ema", "tail", *selected]


def mixture_of(recipe: Recipe, name: str) -> Mixture:
    """Return the mixture called `name`. Raises ConfigError with the names that there are."""
    if name.endswith(".json"):
        return Mixture(Path(name).stem, RivalSettings(), file=Path(name))
    if name in learned_names(recipe.optimize):
        return Mixture(name, RivalSettings(weights=name), "optimize")
    power = POWER.fullmatch(name)
    if power:
        return Mixture(name, RivalSettings(power=float(power[1])))
    rivals = {**RIVALS, **recipe.rivals}
    base, dot, kind = name.partition(".")
    if base in rivals:
        settings = rivals[base]
        if settings.power is not None:
            if dot:
                raise ConfigError(f"{name!r}: {base} has no stage 1, so it has no weight file {kind!r}. Use {base!r}.")
            return Mixture(name, settings)
        kinds, kind = learned_names(stage1_settings(recipe, base)), kind if dot else settings.weights
        if kind not in kinds:
            raise ConfigError(f"{name!r}: no weight file {kind!r}.{nearest(kind, kinds)}")
        return Mixture(name, settings.model_copy(update={"weights": kind}), f"optimize-{base}")
    known = [*learned_names(recipe.optimize), "n^0.5", *rivals]
    raise ConfigError(f"No mixture {name!r}.{nearest(name, known)} A path to a weight file (.json) works too.")


def stage1_settings(recipe: Recipe, rival: str = "") -> OptimizeSettings:
    """Return the settings of the stage 1 of a rival; "" is the recipe's own."""
    if not rival:
        return recipe.optimize
    return changed(recipe.optimize, {**RIVALS, **recipe.rivals}[rival].optimize)


def finetune_settings(recipe: Recipe, mixture: Mixture) -> TrainSettings:
    """Return the settings of the fine-tuning with a mixture."""
    return TrainSettings.model_validate({**recipe.finetune.model_dump(), **mixture.settings.finetune})


def mixtures(recipe: Recipe) -> list[Mixture]:
    """Return the mixtures that a run fine-tunes with, in order, each once; `uniform` is left out: the reference is it."""
    named = [mixture_of(recipe, name) for name in dict.fromkeys((*recipe.weights, *recipe.compare))]
    return [m for m in named if m.name != "uniform"]


def stage1_rivals(recipe: Recipe) -> list[str]:
    """Return the rivals whose stage 1 a run needs; "" is the recipe's own, which always runs."""
    stages = dict.fromkeys(m.stage1 for m in mixtures(recipe) if m.stage1)
    return ["", *(s.removeprefix("optimize-") for s in stages if s != "optimize")]
