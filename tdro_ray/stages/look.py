"""Which stages of a run are up to date, found without running, starting or writing anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tdro_ray import stages
from tdro_ray.errors import TdroError
from tdro_ray.pipeline import Run, Stage
from tdro_ray.stages.rivals import stage1_rivals, stage1_settings
from tdro_ray.stages.training import references


@dataclass
class Look(Run):
    """A run that only looks whether its stages are up to date."""

    writes: bool = False
    current: dict[str, bool] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    sample: tuple[float, float] | None = None  # mean tokens of (a query, a passage) in the store, once asked for

    def do(self, stage: Stage) -> dict[str, Any]:
        self.current[stage.name] = self.is_current(stage)
        return self.manifest(stage.name)

    def see(self, name: str, call: Callable[[Look], Any], *needs: str) -> None:
        """Look at a stage where the stages that it reads are up to date; it is to do where they are not."""
        if all(self.current[need] for need in needs):
            try:
                call(self)
            except TdroError as err:
                self.notes.append(f"{name}: {err}")
        self.current.setdefault(name, False)


def look(run: Look, last: Mapping[str, Callable[[Any], Any]]) -> None:
    """Fill `run.current`, in the order in which the stages run."""
    run.see("ingest", stages.ingest)
    run.see("clean", _clean, "ingest")
    run.see("mine", _mine, "clean")
    run.see("model", stages.model, "clean")
    run.see("reference", stages.reference, "mine", "model")
    rivals = {rival: stage1_settings(run.recipe, rival) for rival in stage1_rivals(run.recipe)}
    for settings in rivals.values():
        names = list(references(settings))
        for name in names:
            run.see(name, lambda look, settings=settings: stages.train_references(look, settings), "mine", "model")
        run.see(stages.score_stage(settings), lambda look, settings=settings: stages.score_for(look, settings), *names)
    for rival, settings in rivals.items():
        name = f"optimize-{rival}" if rival else "optimize"
        run.see(name, lambda look, rival=rival: stages.optimize_for(look, rival), stages.score_stage(settings))
    tuned = {f"finetune-{m.name}": m for m in stages.mixtures(run.recipe)}
    for name, mixture in tuned.items():
        needs = (mixture.stage1,) if mixture.stage1 else ("mine", "model")
        run.see(name, lambda look, mixture=mixture: stages.finetune(look, mixture), *needs)
    run.see("evaluate", stages.evaluate, "reference", *tuned)
    if run.recipe.seeds > 1:
        run.see("seeds", stages.seeds, "evaluate")
    run.see("index", stages.index, "evaluate")
    before = "index"
    for name, call in last.items():
        run.see(name, call, before)
        before = name


def _clean(run: Look) -> None:
    # As below: the stage deletes its manifest where the store is not what it says.
    key = run.manifest("clean").get("key")
    if key and all(c.manifest.clean.get("key") == key for c in stages.collections(run)):
        stages.clean(run)


def _mine(run: Look) -> None:
    # The stage deletes its manifest where a task has been ingested again since: a dry run must not.
    if all(c.manifest.negatives for c in stages.collections(run)):
        stages.mine(run)
