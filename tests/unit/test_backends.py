"""Every backend by equality: two workers in shards = plain updates of one process; resumed = uninterrupted; the model is saved whole."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from training import TASKS, dropout_model, free_port, global_batch, leave, share_of, tiny_base

from tdro_ray.config import LoraSettings, ModelSettings, OptimizeSettings, ScaleSettings, TrainSettings
from tdro_ray.train.backends import BACKENDS, Replicated
from tdro_ray.train.context import LocalContext
from tdro_ray.train.deepspeed_zero import engine_config
from tdro_ray.train.loop import TrainJob, train
from tdro_ray.train.optimizer import adamw
from tdro_ray.train.prepare import trainable
from tdro_ray.train.step import contrastive_step

CPU = torch.device("cpu")
BIG, SMALL = 100_000, 40  # token budgets: one pass, many chunks
STEPS = 5
LORA = LoraSettings(r=4, targets=("q_proj", "v_proj", "down_proj"))
CASES = [
    (lora, optimizer, budget) for lora in (None, LORA) for optimizer in ("sgd", "adamw") for budget in (SMALL, BIG)
]
SHARD_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}  # tiny tensors too
TOLERANCE = {"sgd": 1e-6, "adamw": 1e-5}


def sgd(groups, learning_rate):
    return torch.optim.SGD(groups, lr=learning_rate, momentum=0.9)


def updates(make, case, rank, num_workers, scale=None):
    """Return (trained parameters by name, gradient norms) after some steps in float32 on this worker's shares."""
    lora, optimizer, budget = case
    torch.manual_seed(3)
    model = trainable(dropout_model(torch.float32, 0.0), ModelSettings(lora=lora))
    settings = TrainSettings(temperature=0.2, token_budget=budget, max_grad_norm=0.5, weight_decay=0.1)
    backend = make(model, settings, scale, CPU, sgd if optimizer == "sgd" else adamw)
    norms = []
    for step in range(STEPS):
        batch = share_of(global_batch(9, 3, step % 3, step=step), rank, num_workers)
        contrastive_step(backend, batch, settings, TASKS, 0, CPU)
        norms.append(backend.update(0.05 if optimizer == "sgd" else 1e-3))
    return backend.state_dict()["parameters"], norms


def join(rank, num_workers, port):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=num_workers)
    torch.set_num_threads(1)


def _update_worker(rank, num_workers, port, scales, out):
    join(rank, num_workers, port)
    found = [updates(BACKENDS[s.backend], case, rank, num_workers, s) for s in scales for case in CASES]
    if rank == 0:
        torch.save(found, out)
    leave()


def assert_backends_match(scales, tmp_path):
    mp.spawn(_update_worker, (2, free_port(), scales, tmp_path / "out.pt"), nprocs=2)
    found = iter(torch.load(tmp_path / "out.pt", weights_only=False))
    plain = [updates(Replicated, case, 0, 1) for case in CASES]
    for scale in scales:
        for (lora, optimizer, budget), (expected, expected_norms) in zip(CASES, plain, strict=True):
            parameters, norms = next(found)
            where = f"{scale.backend} {'lora' if lora else 'full'} {optimizer} {budget}"
            assert norms == pytest.approx(expected_norms, rel=1e-4), where
            assert min(norms) > 1e-3, where
            assert parameters.keys() == expected.keys(), where
            for name, value in expected.items():
                torch.testing.assert_close(
                    parameters[name],
                    value,
                    rtol=TOLERANCE[optimizer],
                    atol=TOLERANCE[optimizer],
                    msg=f"{where}: {name}",
                )


def test_sharded_updates_are_those_of_one_plain_process(tmp_path):
    """Five float32 steps, full and LoRA, one pass and chunks that differ in number between the workers."""
    assert_backends_match([ScaleSettings(backend="ddp"), ScaleSettings(backend="fsdp")], tmp_path)


@pytest.mark.long
def test_zero_updates_are_those_of_one_plain_process(tmp_path):
    stages = [ScaleSettings(backend=f"zero{n}", deepspeed=SHARD_ALL if n == 3 else {}) for n in (1, 2, 3)]
    stages += [
        s.model_copy(update={"offload": o}) for s, o in zip(stages[1:], ("optimizer", "parameters"), strict=True)
    ]
    assert_backends_match(stages, tmp_path)


def test_deepspeeds_configuration_is_ours_with_the_recipes_over_it():
    scale = ScaleSettings(backend="zero3", offload="parameters", deepspeed={"zero_optimization": {"sub_group_size": 7}})
    found = engine_config(TrainSettings(max_grad_norm=0.3), scale, torch.bfloat16, 1000)
    assert found["gradient_clipping"] == 0.3 and found["bf16"] == {"enabled": True}
    zero = found["zero_optimization"]
    assert (zero["stage"], zero["sub_group_size"], zero["reduce_bucket_size"]) == (3, 7, 1000)
    assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == "cpu"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"backend": "fsdp", "offload": "optimizer"}, "no effect under backend fsdp"),
        ({"deepspeed": {"wall_clock_breakdown": True}}, "no effect under backend ddp"),
        ({"backend": "zero2", "offload": "parameters"}, "needs scale.backend=zero3"),
    ],
)
def test_settings_that_a_backend_does_not_take_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        ScaleSettings(**settings)


# The loop


def job_of(base, out, scale, lora=None, dro=False, steps=6):
    common = {"steps": steps, "batch_size": 8, "temperature": 0.1, "checkpoint_every": 2, "warmup_steps": 2}
    common |= {"token_budget": SMALL, "learning_rate": 1e-3}
    settings = OptimizeSettings(**common, eta=0.2) if dro else TrainSettings(**common)
    return TrainJob("key", base, out, settings, ModelSettings(lora=lora), TASKS, seed=5, scale=scale)


def run_loop(job, folder, stop, rank, num_workers):
    """Train until step `stop`, where the batches break off, or to the end."""
    dro = isinstance(job.settings, OptimizeSettings)

    def batches(start):
        for step in range(start, job.settings.steps):
            if step == stop:
                raise KeyboardInterrupt
            batch = global_batch(8, 3, None if dro else step % 3, seed=1, step=step)
            yield share_of(batch, rank, num_workers)

    try:
        train(job, LocalContext(batches, folder, "cpu", rank, num_workers))
    except KeyboardInterrupt:
        assert stop is not None
    if num_workers > 1:
        dist.barrier()


def _loop_worker(rank, num_workers, port, runs):
    join(rank, num_workers, port)
    for job, folder, stop in runs:
        run_loop(job, folder, stop, rank, num_workers)
    leave()


def saved(folder):
    from safetensors.torch import load_file

    (model,) = folder.glob("step-*/model/model.safetensors")
    return load_file(model)


def assert_same(ours, theirs, tolerance=0.0):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=tolerance, msg=name)


def assert_resumes(scale, tmp_path, tolerance=0.0, others=()):
    """Interrupted at step 3 and resumed = uninterrupted; so is the checkpoint resumed by `others` (scale, workers), to 1e-5."""
    base = tiny_base(tmp_path / "base")
    start = tiny_weights(base)
    kinds = {"full": (None, False), "lora": (LORA.model_copy(update={"dropout": 0.1}), False), "stage1": (None, True)}
    runs = []
    for kind, (lora, dro) in kinds.items():
        job = job_of(base, tmp_path / "out", scale, lora, dro)
        runs += [(job, tmp_path / kind / "whole", None), (job, tmp_path / kind / "broken", 3)]
        runs += [(job, tmp_path / kind / "broken", None)]
    runs += [(job_of(base, tmp_path / "out", scale), tmp_path / f"other-{i}", 3) for i in range(len(others))]
    mp.spawn(_loop_worker, (2, free_port(), runs), nprocs=2)
    for kind in kinds:
        whole = saved(tmp_path / kind / "whole")
        assert_same(whole, saved(tmp_path / kind / "broken"), tolerance)
        assert whole.keys() == start.keys() and any(not torch.equal(whole[k], start[k]) for k in whole)
    for num_workers in {n for _, n in others}:
        there = [(i, other) for i, (other, n) in enumerate(others) if n == num_workers]
        runs = [(job_of(base, tmp_path / "out", other), tmp_path / f"other-{i}", None) for i, other in there]
        mp.spawn(_loop_worker, (num_workers, free_port(), runs), nprocs=num_workers)
    for i in range(len(others)):
        assert_same(saved(tmp_path / "full" / "whole"), saved(tmp_path / f"other-{i}"), 1e-5)


def tiny_weights(base):
    from safetensors.torch import load_file

    return load_file(base / "model.safetensors")


def test_a_sharded_run_resumes_bitwise_and_on_another_number_of_workers(tmp_path):
    fsdp, ddp = ScaleSettings(backend="fsdp"), ScaleSettings(backend="ddp")
    assert_resumes(fsdp, tmp_path, others=[(fsdp, 1), (ddp, 1)])


@pytest.mark.long
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_zero_run_resumes_and_another_backend_or_number_of_workers_goes_on_from_it(tmp_path, stage):
    zero = ScaleSettings(backend=f"zero{stage}", deepspeed=SHARD_ALL if stage == 3 else {})
    assert_resumes(zero, tmp_path, others=[(ScaleSettings(backend="ddp"), 1), (zero, 1)])


def _low_precision_worker(rank, num_workers, port, backend, lora, out):
    join(rank, num_workers, port)
    found = low_precision_updates(BACKENDS[backend], lora, rank, num_workers)
    if rank == 0:
        torch.save(found, out)
    leave()


def low_precision_updates(make, lora, rank, num_workers, dtype=torch.bfloat16):
    """Return (parameters before, after) of updates too small for bfloat16."""
    torch.manual_seed(3)
    model = trainable(dropout_model(dtype, 0.0), ModelSettings(lora=lora))
    settings = TrainSettings(temperature=0.2, token_budget=SMALL, max_grad_norm=1e9, weight_decay=0.0)
    backend = make(model, settings, ScaleSettings(), CPU, lambda groups, rate: torch.optim.SGD(groups, lr=rate))
    before = {
        name: value.clone() for name, value in (backend.state_dict()["parameters"] or {}).items() if value is not None
    }
    for step in range(STEPS):
        batch = share_of(global_batch(9, 3, step % 3, step=step), rank, num_workers)
        contrastive_step(backend, batch, settings, TASKS, 0, CPU)
        backend.update(1e-4)
    return before, backend.state_dict()["parameters"]


@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("backend", ["ddp", "fsdp"])
def test_bfloat16_weights_are_stepped_in_float32(tmp_path, backend, lora):
    """Steps of 1e-4 times the gradient move a bfloat16 model nearly as far as the float32 model that it rounds."""
    mp.spawn(_low_precision_worker, (2, free_port(), backend, lora, tmp_path / "out.pt"), nprocs=2)
    before, after = torch.load(tmp_path / "out.pt")
    exact_before, exact_after = low_precision_updates(Replicated, lora, 0, 1, torch.float32)
    assert {value.dtype for value in after.values()} == {torch.float32}
    moved = torch.cat([(after[n] - before[n]).flatten() for n in exact_after])
    exact = torch.cat([(exact_after[n] - exact_before[n]).flatten() for n in exact_after])
    assert exact.norm() > 1e-5 and (moved - exact).norm() < 0.1 * exact.norm()
