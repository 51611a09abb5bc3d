"""Dashboards show what metrics.jsonl holds, a resumed run goes on in them, and none of them can stop a training."""

from __future__ import annotations

import importlib.machinery
import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from training import TASKS, global_batch, tiny_base

from tdro_ray.config import LoggingSettings, ModelSettings, OptimizeSettings
from tdro_ray.errors import ConfigError
from tdro_ray.train.context import LocalContext
from tdro_ray.train.loop import TrainJob, train
from tdro_ray.train.sinks import LogTo, check_installed, scalars

STEPS = 6


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


def run(base: Path, folder: Path, logging: LoggingSettings, stop: int = STEPS, rank: int = 0) -> list[dict[str, Any]]:
    """Train a few steps of stage 1 and return the records of metrics.jsonl."""
    settings = OptimizeSettings(steps=STEPS, batch_size=8, temperature=0.1, checkpoint_every=2, log_every=1)
    to = LogTo(logging, "small", "optimize", "abc", folder, {"eta": settings.eta})

    def batches(start: int) -> Any:
        for step in range(start, STEPS):
            if step == stop:
                raise KeyboardInterrupt
            yield replace(global_batch(8, 3, None, seed=1, step=step), rank=rank)

    job = TrainJob("key", base, folder / "stages" / "optimize", settings, ModelSettings(), TASKS, 5, log_to=to)
    train(job, LocalContext(batches, folder / "kept", rank=rank))
    return [json.loads(line) for line in (job.out / "metrics.jsonl").read_text().splitlines()]


def fake(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


def test_tensorboard_shows_the_records_and_a_resumed_run_goes_on(base: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    asked = LoggingSettings(tensorboard=True)
    with pytest.raises(KeyboardInterrupt):
        run(base, tmp_path, asked, stop=5)  # after the checkpoint of step 4: step 5 is done again
    records = run(base, tmp_path, asked)
    shown = EventAccumulator(str(tmp_path / "tensorboard" / "optimize"))
    shown.Reload()
    tags = set(shown.Tags()["scalars"])
    assert {"loss", "lr", "tokens_per_s", "data_wait_s", "peak_memory_mb", "grad_norm"} <= tags
    assert {f"{kind}/{task}" for kind in ("alpha", "signal") for task in TASKS.names} <= tags and "step" not in tags
    for tag in ("loss", "alpha/b"):
        values = {event.step: event.value for event in shown.Scalars(tag)}
        assert len(shown.Scalars(tag)) == STEPS and list(values) == [r["step"] for r in records]
        expected = [r["loss"] if tag == "loss" else r["alpha"][1] for r in records]
        assert list(values.values()) == pytest.approx(expected, rel=1e-6)


def test_only_rank_0_writes_and_nothing_by_default(base: Path, tmp_path: Path) -> None:
    (tmp_path / "stages" / "optimize").mkdir(parents=True)
    (tmp_path / "stages" / "optimize" / "metrics.jsonl").write_text("")
    run(base, tmp_path, LoggingSettings(tensorboard=True), rank=1)
    assert not (tmp_path / "tensorboard").exists()
    assert LogTo().settings == LoggingSettings(tensorboard=False)  # a bare training, a trial of a search


def test_wandb_gets_the_records_under_one_id(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def init(**given: Any) -> Any:
        calls.append(("init", given))
        return SimpleNamespace(
            log=lambda values, step: calls.append(("log", step, values)), finish=lambda: calls.append(("finish",))
        )

    fake(monkeypatch, "wandb", init=init)
    records = run(base, tmp_path, LoggingSettings(tensorboard=False, wandb="mixtures"))
    kind, given = calls[0]
    assert kind == "init" and given["project"] == "mixtures" and given["name"] == "small-optimize"
    assert given["id"] == "small-optimize-abc" and given["resume"] == "allow" and given["config"] == {"eta": 0.02}
    assert [c[1] for c in calls[1:-1]] == [1, 2, 3, 4, 5, 6] and calls[-1] == ("finish",)
    assert calls[1][2] == scalars(records[0], TASKS.names) and calls[1][2]["alpha/a"] == records[0]["alpha"][0]


def test_mlflow_gets_the_records_and_a_resumed_run_the_same_id(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def start_run(run_id: str | None, run_name: str) -> Any:
        calls.append(("start", run_id, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id or "r1"))

    fake(
        monkeypatch,
        "mlflow",
        set_experiment=lambda name: calls.append(("experiment", name)),
        start_run=start_run,
        log_params=lambda values: calls.append(("params", values)),
        log_metrics=lambda values, step: calls.append(("metrics", step, values["loss"])),
        end_run=lambda: calls.append(("end",)),
    )
    asked = LoggingSettings(tensorboard=False, mlflow="mixtures")
    with pytest.raises(KeyboardInterrupt):
        run(base, tmp_path, asked, stop=5)
    assert calls[:3] == [("experiment", "mixtures"), ("start", None, "small-optimize"), ("params", {"eta": 0.02})]
    assert calls[-1] == ("end",)  # closed, though the run was interrupted
    calls.clear()
    records = run(base, tmp_path, asked)
    assert calls[:2] == [("experiment", "mixtures"), ("start", "r1", "small-optimize")]
    assert calls[2:] == [("metrics", r["step"], r["loss"]) for r in records[4:]] + [("end",)]


def test_a_dashboard_that_fails_is_left_out_and_the_training_goes_on(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(values: Any, step: int) -> None:
        raise OSError("no route to host")

    fake(monkeypatch, "wandb", init=lambda **_: SimpleNamespace(log=broken, finish=lambda: None))
    with caplog.at_level(logging.WARNING):
        records = run(base, tmp_path, LoggingSettings(tensorboard=False, wandb="mixtures"))
    assert len(records) == STEPS
    said = [r.getMessage() for r in caplog.records if r.name == "tdro_ray.train.sinks"]
    assert said == ["wandb is left out from here on: no route to host. metrics.jsonl has everything."]


def test_a_dashboard_that_is_asked_for_and_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from tdro_ray.train import sinks

    monkeypatch.setattr(sinks, "find_spec", lambda name: None)
    check_installed(LoggingSettings())  # tensorboard is used where it is there
    with pytest.raises(ConfigError, match="wandb is not installed: pip install wandb"):
        check_installed(LoggingSettings(wandb="mixtures"))


def test_what_is_no_finite_number_is_not_shown() -> None:
    record = {"step": 3, "loss": float("nan"), "lr": 0.1, "task": "a", "skipped": [1, 2], "alpha": [0.5, 0.25, 0.25]}
    assert scalars(record, TASKS.names) == {"lr": 0.1, "skipped": 2.0, "alpha/a": 0.5, "alpha/b": 0.25, "alpha/c": 0.25}
