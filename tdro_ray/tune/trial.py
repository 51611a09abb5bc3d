"""One trial: learn task weights under a setting, fine-tune briefly with them, measure retrieval on the dev queries.

Knows nothing of Ray: a trial is plain training in its own process. What it finishes stays in its folder, which is named
after everything that decides its result, so a trial that is asked for again, after a kill or by a larger study, goes on
where it was or answers at once.

    setting.json                   what is tried
    optimize/done.json             stage 1 is finished: seconds, loss; beside it alpha.json and trajectory.parquet
    optimize/, finetune/           metrics.jsonl; checkpoints while they train
    evaluations.json               evaluations so far: step of the fine-tuning, nDCG per task
    result.json                    written last
    confirm-<seed>.json            the last evaluation of a further fine-tuning, rows drawn by that seed
"""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from tdro_ray.config import ModelSettings, OptimizeSettings, TrainSettings, changed
from tdro_ray.data.collate import BatchRecipe
from tdro_ray.data.plan import Plan
from tdro_ray.pipeline import key_of, read_json, write_json
from tdro_ray.train.step import TaskSettings

Setting = dict[str, Any]  # field of OptimizeSettings -> value


@dataclass(frozen=True)
class Study:
    """What all trials of a study share; small, and picklable."""

    key: str  # of everything but the setting that decides a trial's result
    folder: Path  # one folder per trial
    tasks: TaskSettings
    batches: BatchRecipe  # of stage 1, with the reference scores
    proxy: Path  # model folder that the proxy starts from
    optimize: OptimizeSettings  # shortened to the trial's steps
    finetune: TrainSettings  # the same
    model: ModelSettings
    seed: int
    evaluations: int
    ndcg_at: int
    batch_tokens: int  # padded tokens per forward while encoding
    device: str = "cpu"


def trial_folder(study: Study, setting: Setting) -> Path:
    """Folder of a trial; equal settings of equal studies share it."""
    return study.folder / key_of(study.key, setting)


def run_trial(
    study: Study, setting: Setting, report: Callable[[dict[str, Any]], None] = lambda metrics: None
) -> dict[str, Any]:
    """Run the trial, or what is left of it, and return its result: evaluations, seconds and alpha.

    `report` gets the metrics of every evaluation in order, those of an earlier start of the trial too. Of the files
    only the small ones stay; the models are deleted.
    """
    folder = trial_folder(study, setting)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        result = read_json(folder / "result.json")
        if result:
            for evaluation in result["evaluations"]:
                report(metrics_of(evaluation))
            return result
        if not (folder / "setting.json").exists():  # its time is the trial's first start
            write_json(folder / "setting.json", setting)
        learned = _learn(study, setting, folder / "optimize")
        found = _finetune(study, learned["alpha"], folder, report)
        result = {
            "setting": setting,
            "alpha": dict(zip(study.tasks.names, learned["alpha"], strict=True)),
            "evaluations": found["evaluations"],
            "per_query": found["per_query"],
            "seconds": {"optimize": learned["seconds"], "finetune": found["finetune"], "evaluate": found["evaluate"]},
            "loss": {"optimize": learned["loss"], "finetune": found["loss"]},
        }
        write_json(folder / "result.json", result)
    drop_models(folder)
    report(metrics_of(result["evaluations"][-1]))  # last: a scheduler may end the trial at its final report
    return result


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the trial's folder: a trial of the same setting that runs at once waits, and then finds the result."""
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def drop_models(folder: Path) -> None:
    """Delete the checkpoints of a trial."""
    for stage in ("optimize", "finetune"):
        shutil.rmtree(folder / stage / "checkpoints", ignore_errors=True)


def metrics_of(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """What Tune, its schedulers and TensorBoard see of an evaluation."""
    return {"mean": evaluation["mean"], "worst": evaluation["worst"], "step": evaluation["step"]}


def shortened(settings: TrainSettings, steps: int) -> Any:
    """Return the settings for a run of `steps`, with the warm-up in proportion: a short run of the same shape."""
    warmup = round(settings.warmup_steps * min(1.0, steps / settings.steps))
    return settings.model_copy(update={"steps": steps, "warmup_steps": warmup})


def _learn(study: Study, setting: Setting, out: Path) -> dict[str, Any]:
    """Stage 1 under the setting: {"alpha": current weights in the tasks' order, "seconds", "loss"}."""
    done = read_json(out / "done.json")
    if done:
        return done
    from tdro_ray.data.stream import local_batches
    from tdro_ray.train.context import LocalContext
    from tdro_ray.train.loop import TrainJob, train

    settings = changed(study.optimize, setting)
    job = TrainJob(key_of(study.key, setting), study.proxy, out, settings, study.model, study.tasks, study.seed)
    context = LocalContext(partial(local_batches, study.batches), out / "checkpoints", study.device)
    began = time.monotonic()
    summary = train(job, context)
    newest = context.latest_checkpoint()
    assert newest is not None
    for name in ("alpha.json", "trajectory.parquet"):
        shutil.copy2(newest / name, out / name)
    alpha = json.loads((out / "alpha.json").read_text(encoding="utf-8"))["current"]
    done = {"alpha": alpha, "seconds": round(time.monotonic() - began, 2), "loss": summary["loss"]}
    write_json(out / "done.json", done)
    return done


def confirm_trial(study: Study, setting: Setting, seed: int) -> float:
    """Fine-tune again with the weights of a finished trial, rows drawn by another seed; return the mean nDCG."""
    folder = trial_folder(study, setting)
    path = folder / f"confirm-{seed}.json"
    found = read_json(path)
    if not found:
        alpha = list(read_json(folder / "result.json")["alpha"].values())
        again = replace(study, seed=seed, evaluations=1)
        found = _finetune(again, alpha, folder / f"confirm-{seed}", lambda metrics: None)["evaluations"][-1]
        write_json(path, found)
        shutil.rmtree(folder / f"confirm-{seed}")
    return float(found["mean"])


def fine_tuned(study: Study, alpha: list[float], folder: Path) -> dict[str, float]:
    """Return nDCG per task on the dev queries after one fine-tuning with the weights, evaluated at its end."""
    folder.mkdir(parents=True, exist_ok=True)
    found = _finetune(replace(study, evaluations=1), alpha, folder, lambda metrics: None)
    return dict(found["evaluations"][-1]["tasks"])


def _finetune(
    study: Study, alpha: list[float], folder: Path, report: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Stage 2 under the weights, evaluated along the way."""
    from tdro_ray.data.stream import local_batches
    from tdro_ray.train.context import LocalContext
    from tdro_ray.train.loop import TrainJob, train

    settings = study.finetune
    every = -(-settings.steps // study.evaluations)
    settings = settings.model_copy(update={"checkpoint_every": every})
    sizes = study.batches.plan.sizes
    plan = Plan(sizes, alpha, settings.steps, settings.batch_size, study.seed, "homogeneous")
    batches = replace(study.batches, plan=plan, num_negatives=settings.num_negatives, scores=None, probe=None)
    key = key_of(study.key, alpha, study.seed)
    job = TrainJob(key, study.batches.model, folder / "finetune", settings, study.model, study.tasks, study.seed)
    found = _Evaluations(study, job, folder / "evaluations.json", report)

    class Watched(LocalContext):
        """Evaluates at every checkpoint, before it is kept: a checkpoint that is kept has its evaluation."""

        def report(self, metrics: dict[str, Any], checkpoint: Path | None = None) -> None:
            if checkpoint is not None:
                found.add(int(metrics["step"]), checkpoint)
            super().report(metrics, checkpoint)

    context = Watched(partial(local_batches, batches), folder / "finetune" / "checkpoints", study.device)
    began = time.monotonic()
    summary = train(job, context)
    seconds = round(time.monotonic() - began - found.spent, 2)
    return {**found.kept, "finetune": seconds, "loss": summary["loss"]}


class _Evaluations:
    """The evaluations of a trial's fine-tuning, kept in a file as they come."""

    def __init__(self, study: Study, job: Any, path: Path, report: Callable[[dict[str, Any]], None]) -> None:
        self.study, self.job, self.path, self.report = study, job, path, report
        self.spent = 0.0  # seconds in this process
        self.kept: dict[str, Any] = read_json(path) or {"evaluations": [], "per_query": {}, "evaluate": 0.0}
        for evaluation in self.kept["evaluations"]:
            self._report(evaluation)

    def add(self, step: int, checkpoint: Path) -> None:
        """Evaluate the checkpoint of `step` unless that is done already."""
        known = self.kept["evaluations"]
        if known and known[-1]["step"] >= step:
            return
        began = time.monotonic()
        per_query = evaluate_dev(self.study, load_checkpoint(self.job, checkpoint, self.study.device))
        tasks = {task: sum(scores.values()) / len(scores) for task, scores in per_query.items()}
        evaluation = {
            "step": step,
            "mean": sum(tasks.values()) / len(tasks),
            "worst": min(tasks.values()),
            "tasks": tasks,
        }
        self.spent += time.monotonic() - began
        seconds = round(self.kept["evaluate"] + time.monotonic() - began, 2)
        self.kept = {"evaluations": [*known, evaluation], "per_query": per_query, "evaluate": seconds}
        write_json(self.path, self.kept)
        self._report(evaluation)

    def _report(self, evaluation: dict[str, Any]) -> None:
        if evaluation["step"] < self.job.settings.steps:  # the final one is reported when the trial's result is written
            self.report(metrics_of(evaluation))


def load_checkpoint(job: Any, checkpoint: Path, device: str) -> Any:
    """Return the encoder of a checkpoint: of its finished model folder, or of the parameters so far."""
    import torch

    from tdro_ray.model.encoder import Encoder, load_retriever
    from tdro_ray.model.tokenize import TextTokenizer
    from tdro_ray.train.prepare import trainable

    if (checkpoint / "model").is_dir():
        return Encoder.load(checkpoint / "model", device)
    retriever = trainable(load_retriever(job.base, job.model.dtype), job.model)
    state = torch.load(checkpoint / "weights.pt", map_location="cpu", weights_only=True)["parameters"]
    own = dict(retriever.named_parameters())
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)
    return Encoder(retriever, TextTokenizer(job.base), device)


def evaluate_dev(study: Study, encoder: Any) -> dict[str, dict[str, float]]:
    """Return `{task: {query id: nDCG}}` on the dev queries of every task that has some."""
    from tdro_ray.evaluate.benchmark import evaluate_task

    found = {}
    for task, (query_ids, queries, docids, passages, qrels) in _dev_sets(
        study.batches.store, study.batches.names, study.batches.model
    ).items():
        vectors = [encoder.embed_ids(ids, study.batch_tokens) for ids in (queries, passages)]
        _, values, _ = evaluate_task(vectors[0], query_ids, vectors[1], docids, qrels, study.ndcg_at, study.ndcg_at)
        found[task] = values[f"ndcg@{study.ndcg_at}"]
    return found


@lru_cache(maxsize=1)
def _dev_sets(
    store: Path, names: tuple[str, ...], model: Path
) -> dict[str, tuple[list[str], Any, list[str], Any, Any]]:
    """Query ids and tokens, passage ids and tokens, judgements of every dev split; read once for all trials of a process."""
    from tdro_ray.data.collection import CollectionStore
    from tdro_ray.model.tokenize import TextTokenizer

    tokenizer, collections, found = TextTokenizer(model), CollectionStore(store), {}
    for name in names:
        test = collections[name].test("dev")
        if test is not None:
            queries = tokenizer.encode(list(test.queries.values()), "query", name)
            passages = tokenizer.encode([p.full_text for p in test.corpus], "passage", name)
            found[name] = (list(test.queries), queries, [p.docid for p in test.corpus], passages, test.qrels)
    return found
