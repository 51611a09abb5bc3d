"""The loop on a bare machine, through LocalContext: it learns, and an interrupted run ends where an uninterrupted one does."""

import contextlib
import json
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from training import TASKS, global_batch, leave, share_of, tiny_base

from tdro_ray.config import LoraSettings, ModelSettings, OptimizeSettings, ScaleSettings, TrainSettings
from tdro_ray.dro.files import read_trajectory
from tdro_ray.errors import CheckpointError, TdroError
from tdro_ray.train.context import LocalContext
from tdro_ray.train.loop import TrainJob, learning_rate, train
from tdro_ray.train.step import TaskSettings

STEPS = 6


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("base"))


def job_of(base, out, dro, lora=None, dtype="float32"):
    common = {
        "steps": STEPS,
        "batch_size": 8,
        "temperature": 0.1,
        "checkpoint_every": 2,
        "log_every": 2,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
    }
    settings = OptimizeSettings(**common, eta=0.2) if dro else TrainSettings(**common)
    return TrainJob("key", base, out, settings, ModelSettings(lora=lora, dtype=dtype), TASKS, seed=5)


def batches_for(dro, stop=STEPS):
    def batches(start):
        for step in range(start, STEPS):
            if step == stop:
                raise KeyboardInterrupt
            yield global_batch(8, 3, None if dro else step % 3, seed=1, step=step)

    return batches


def final_weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize(
    ("dro", "lora", "dtype"),
    [
        *((dro, lora, "float32") for dro in (False, True) for lora in (None, LoraSettings(r=4, dropout=0.1))),
        (False, None, "bfloat16"),  # its float32 weights are in the checkpoint too
    ],
)
def test_an_interrupted_run_ends_bitwise_like_an_uninterrupted_one(base, tmp_path, dro, lora, dtype):
    whole, broken = (
        LocalContext(batches_for(dro), tmp_path / "a"),
        LocalContext(batches_for(dro, stop=3), tmp_path / "b"),
    )
    train(job_of(base, tmp_path / "out-a", dro, lora, dtype), whole)
    with pytest.raises(KeyboardInterrupt):
        train(job_of(base, tmp_path / "out-b", dro, lora, dtype), broken)
    resumed = LocalContext(batches_for(dro), tmp_path / "b")
    train(job_of(base, tmp_path / "out-b", dro, lora, dtype), resumed)

    a, b = whole.latest_checkpoint(), resumed.latest_checkpoint()
    ours, theirs = final_weights(a), final_weights(b)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    start = final_weights_of_base(base)
    assert any(not torch.equal(ours[k], start[k].to(ours[k].dtype)) for k in ours)
    assert {str(value.dtype) for value in ours.values()} == {f"torch.{dtype}"}
    steps = [json.loads(line)["step"] for line in (tmp_path / "out-b" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6]
    if dro:
        assert (a / "alpha.json").read_text() == (b / "alpha.json").read_text()
        one, two = read_trajectory(a / "trajectory.parquet"), read_trajectory(b / "trajectory.parquet")
        assert one.steps == two.steps == list(range(STEPS))
        assert (one.alpha_SG == two.alpha_SG).all() and (one.signal_SG == two.signal_SG).all()


def final_weights_of_base(base):
    from safetensors.torch import load_file

    return load_file(base / "model.safetensors")


def test_the_loss_of_repeated_batches_falls(base, tmp_path):
    settings = TrainSettings(steps=60, batch_size=8, temperature=0.1, learning_rate=5e-3, warmup_steps=5, log_every=1)
    context = LocalContext(
        lambda start: (replace(global_batch(8, 2, 0), step=s) for s in range(start, 60)), tmp_path / "c"
    )
    train(TrainJob("key", base, tmp_path / "out", settings, ModelSettings(), TASKS, seed=0), context)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_another_runs_checkpoint_is_refused(base, tmp_path):
    train(job_of(base, tmp_path / "out", False), LocalContext(batches_for(False), tmp_path / "a"))
    with pytest.raises(CheckpointError, match="other settings"):
        train(
            replace(job_of(base, tmp_path / "out", False), key="new"), LocalContext(batches_for(False), tmp_path / "a")
        )


def test_a_batch_out_of_order_stops_the_run(base, tmp_path):
    context = LocalContext(
        lambda start: iter([global_batch(8, 3, 0, step=0), global_batch(8, 3, 0, step=2)]), tmp_path / "a"
    )
    with pytest.raises(TdroError, match="expected its share of step 1 and received step 2"):
        train(job_of(base, tmp_path / "out", False), context)


def test_batches_that_end_early_are_no_success(base, tmp_path):
    context = LocalContext(lambda start: iter([global_batch(8, 3, 0, step=0)]), tmp_path / "a")
    with pytest.raises(TdroError, match="ended after 1 of 6"):
        train(job_of(base, tmp_path / "out", False), context)


def test_learning_rate_warms_up_and_ends_at_the_floor():
    settings = TrainSettings(steps=100, warmup_steps=10, learning_rate=1.0, min_lr_ratio=0.1)
    rates = [learning_rate(s, settings) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55) and rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_single_task_runs(base, tmp_path):
    tasks = TaskSettings(("a",), (8,), (None,), (True,))
    settings = OptimizeSettings(steps=2, batch_size=4, temperature=0.1)
    batches = [replace(global_batch(4, 2, None, step=s), task_B=global_batch(4, 2, 0).task_B) for s in range(2)]
    context = LocalContext(lambda start: iter(batches[start:]), tmp_path / "a")
    train(TrainJob("k", base, tmp_path / "o", settings, ModelSettings(), tasks, 0), context)
    assert json.loads((context.latest_checkpoint() / "alpha.json").read_text())["current"] == [1.0]


def test_held_steps_leave_alpha_alone_and_options_reach_the_measure(base, tmp_path):
    def alphas(**changes):
        settings = OptimizeSettings(steps=STEPS, batch_size=8, temperature=0.1, eta=0.2, **changes)
        context = LocalContext(batches_for(True), tmp_path / str(changes))
        train(TrainJob("k", base, tmp_path / "o", settings, ModelSettings(), TASKS, 0), context)
        return read_trajectory(context.latest_checkpoint() / "trajectory.parquet").alpha_SG

    held = alphas(hold=0.5)
    assert (abs(held[:3] - 1 / 3) < 1e-12).all() and abs(held[3] - 1 / 3).max() > 1e-3
    moved = alphas()
    for change in (
        {"measure_options": {"smooth": 1.0}},
        {"eta_schedule": "linear"},
        {"momentum": 0.9},
        {"size_c": 5.0},
    ):
        assert abs(alphas(**change)[-1] - moved[-1]).max() > 1e-6


def test_a_run_killed_after_its_last_checkpoint_asks_for_no_batch(base, tmp_path):
    def refuse(start):
        raise AssertionError(f"asked for batches from step {start}")

    job = job_of(base, tmp_path / "out", False)
    train(job, LocalContext(batches_for(False), tmp_path / "a"))
    assert train(job, LocalContext(refuse, tmp_path / "a"))["steps"] == STEPS


def test_stage_1_ends_once_its_weights_stand_still(base, tmp_path):
    """Signals that cancel: alpha moves to and fro, its windows' means do not; a restart finds the run finished."""

    def run(out, **changes):
        settings = OptimizeSettings(steps=STEPS, batch_size=8, temperature=0.1, eta=1e-9, window=2, **changes)
        job = TrainJob("k", base, tmp_path / out, settings, ModelSettings(), TASKS, 0)
        return job, train(job, LocalContext(batches_for(True), tmp_path / out / "checkpoints"))

    assert run("never")[1]["steps"] == STEPS
    assert run("held", tolerance=1e-3, hold=0.5)[1]["steps"] == STEPS  # two windows after the hold never fit
    job, done = run("still", tolerance=1e-3)
    assert done["steps"] == 4
    context = LocalContext(lambda start: iter(()), tmp_path / "still" / "checkpoints")
    assert train(job, context)["steps"] == 4
    assert len(read_trajectory(context.latest_checkpoint() / "trajectory.parquet").steps) == 4


def test_tail_is_the_mean_of_the_last_share_of_the_weights(base, tmp_path):
    settings = OptimizeSettings(steps=STEPS, batch_size=8, temperature=0.1, eta=0.5, tail=0.5)
    context = LocalContext(batches_for(True), tmp_path / "a")
    train(TrainJob("k", base, tmp_path / "o", settings, ModelSettings(), TASKS, 0), context)
    found = json.loads((context.latest_checkpoint() / "alpha.json").read_text())
    alpha_SG = read_trajectory(context.latest_checkpoint() / "trajectory.parquet").alpha_SG
    assert found["tail"] == pytest.approx(alpha_SG[3:].mean(0).tolist(), rel=1e-12)
    assert max(abs(a - b) for a, b in zip(found["tail"], found["mean"])) > 1e-4


def test_a_snapshot_is_the_model_of_that_step_and_changes_nothing_after_it(base, tmp_path):
    def run(out, **changes):
        job = replace(job_of(base, tmp_path / out, False), **changes)
        context = LocalContext(batches_for(False), tmp_path / out / "checkpoints")
        train(job, context)
        return context.latest_checkpoint()

    whole, plain = run("whole", snapshots=(2, 4)), run("plain")
    short = job_of(base, tmp_path / "short", False).settings.model_copy(update={"steps": 2})
    assert torch.equal(*(next(iter(final_weights(f).values())) for f in (whole, plain)))
    # A run that stops there, with the same learning rates: warm-up covers both steps.
    early = run("early", settings=short)
    for name, value in final_weights(early).items():
        from safetensors.torch import load_file

        assert torch.equal(value, load_file(tmp_path / "whole" / "start-2" / "model.safetensors")[name])
    assert not (tmp_path / "plain" / "start-2").exists()


def test_group_dro_keeps_its_weights_over_a_restart(base, tmp_path):
    def run(out, stop=STEPS):
        job = job_of(base, tmp_path / out, False)
        job = replace(job, settings=job.settings.model_copy(update={"group_dro": 0.2}))
        context = LocalContext(batches_for(False, stop), tmp_path / out / "checkpoints")
        train(job, context)
        return context.latest_checkpoint()

    with pytest.raises(KeyboardInterrupt):
        run("broken", stop=3)
    broken, whole = run("broken"), run("whole")
    alphas = [json.loads((f / "alpha.json").read_text())["current"] for f in (broken, whole)]
    assert alphas[0] == alphas[1] and max(alphas[0]) > 0.35
    assert all(torch.equal(a, final_weights(whole)[n]) for n, a in final_weights(broken).items())


def _run_worker(rank, num_workers, meeting, base, folder, dro, stop):
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=num_workers)
    torch.set_num_threads(1)

    def shares(start):
        batches = iter(batches_for(dro, stop)(start))
        return (share_of(batch, rank, num_workers) for batch in batches)

    context = LocalContext(shares, folder / "checkpoints", rank=rank, world_size=num_workers)
    with contextlib.suppress(KeyboardInterrupt):
        train(job_of(base, folder / "out", dro), context)
    leave()


@pytest.mark.parametrize("dro", [False, True])
def test_a_run_goes_on_with_another_number_of_workers(base, tmp_path, dro):
    """Killed after step 3 with two workers, resumed by three: the same global batches, so the same model but for rounding."""

    def run(name, num_workers, stop=STEPS):
        meeting = tmp_path / f"{name}-{num_workers}"
        mp.spawn(_run_worker, (num_workers, meeting, base, tmp_path / name, dro, stop), nprocs=num_workers)
        return sorted((tmp_path / name / "checkpoints").glob("step-*"))[-1]

    whole = run("whole", 2)
    assert run("broken", 2, stop=3).name == "step-000000002"
    resumed = run("broken", 3)
    ours, theirs, start = final_weights(whole), final_weights(resumed), final_weights_of_base(base)
    moved = max(float((ours[k] - start[k]).abs().max()) for k in ours)
    assert moved > 1e-3
    assert max(float((ours[k] - theirs[k]).abs().max()) for k in ours) < 1e-3 * moved
    if dro:
        one, two = read_trajectory(whole / "trajectory.parquet"), read_trajectory(resumed / "trajectory.parquet")
        assert abs(one.alpha_SG - two.alpha_SG).max() < 1e-6


def test_checkpoints_are_also_made_by_the_clock_and_the_newest_are_kept(base, tmp_path):
    job = job_of(base, tmp_path / "out", False)
    often = job.settings.model_copy(update={"checkpoint_every": 100})

    def kept(name, minutes, keep):
        context = LocalContext(batches_for(False), tmp_path / name, keep=keep)
        train(replace(job, settings=often, scale=ScaleSettings(checkpoint_minutes=minutes)), context)
        return sorted(int(p.name.removeprefix("step-")) for p in (tmp_path / name).glob("step-*"))

    assert kept("always", 1e-9, 3) == [4, 5, 6]
    assert kept("newest", 1e-9, 1) == [6]
    assert kept("end", 60.0, 3) == [6]


def _clocked_worker(rank, num_workers, meeting, base, folder):
    import time

    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=num_workers)
    if rank:
        time.monotonic = lambda: 0.0  # this worker's clock stands still: rank 0's decides
    job = job_of(base, folder / f"out-{rank}", False)
    settings = job.settings.model_copy(update={"checkpoint_every": 100})
    shares = lambda start: (share_of(batch, rank, num_workers) for batch in batches_for(False)(start))  # noqa: E731
    context = LocalContext(shares, folder / "checkpoints", rank=rank, world_size=num_workers)
    train(replace(job, settings=settings, scale=ScaleSettings(checkpoint_minutes=1e-9)), context)
    (folder / f"reported-{rank}.json").write_text(json.dumps([r["step"] for r in context.reported]))
    leave()


def test_all_workers_follow_the_first_ones_clock(base, tmp_path):
    mp.spawn(_clocked_worker, (2, tmp_path / "meeting", base, tmp_path), nprocs=2)
    for rank in range(2):
        assert json.loads((tmp_path / f"reported-{rank}.json").read_text()) == [1, 2, 3, 4, 5, 6]
