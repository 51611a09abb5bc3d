"""Which stages of a run are up to date, found without running, starting or writing anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tdro_ray import stages
from tdro_ray.errors import TdroError
from tdro_ray.pipeline import Run, Stage


@dataclass
class Look(Run):
    """A run that only looks whether its stages are up to date."""

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
    run.see("mine", _mine, "ingest")
    run.see("model", stages.model, "ingest")
    run.see("reference", stages.reference, "mine", "model")
    run.see("score", stages.score, "reference")
    run.see("optimize", stages.optimize, "score")
    tuned = {f"finetune-{stages.model_name(name)}": name for name in compared(run)}
    for stage, name in tuned.items():
        learned = name != "proportional" and not name.endswith(".json")
        needs = ("optimize",) if learned else ("mine", "model")
        run.see(stage, lambda look, name=name: _finetune(look, name), *needs)
    run.see("evaluate", stages.evaluate, "reference", *tuned)
    run.see("index", stages.index, "evaluate")
    before = "index"
    for name, call in last.items():
        run.see(name, call, before)
        before = name


def compared(run: Run) -> list[str]:
    """Weights that stage 2 runs with; the uniform ones are the reference's."""
    names = dict.fromkeys((*run.recipe.weights, *run.recipe.compare))
    return [name for name in names if name != stages.BASELINE]


def _mine(run: Look) -> None:
    # The stage deletes its manifest where a task has been ingested again since: a dry run must not.
    if all(c.manifest.negatives for c in stages.collections(run)):
        stages.mine(run)


def _finetune(run: Look, name: str) -> None:
    if name != "proportional":
        stages.finetune(run, name)
        return
    from tdro_ray.dro import select  # the stage writes these weights into a file first: a dry run must not

    weights = select.proportional({c.name: c.manifest.rows for c in stages.collections(run)})
    ordered = [weights.get(task, 0.0) for task in stages.task_names(run)]
    stages.contrastive(run, f"finetune-{name}", run.recipe.finetune, ordered, {}, name)
