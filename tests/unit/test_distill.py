"""Distillation: the loss is the one written out, workers do not change it, and scores reach the batch from the file."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from training import TASKS, dropout_model, free_port, global_batch, leave, share_of, tiny_base

from tdro_ray.config import TrainSettings
from tdro_ray.data.collate import BatchRecipe, Collator, versions_of
from tdro_ray.data.collection import CollectionStore
from tdro_ray.data.formats import Reject, read
from tdro_ray.data.parsed import parsed_table
from tdro_ray.data.plan import Plan
from tdro_ray.data.writer import TaskWriter, WriteSettings
from tdro_ray.train.backends import Replicated
from tdro_ray.train.comm import sum_
from tdro_ray.train.step import contrastive_step
from tdro_ray.types import TaskInfo

CPU = torch.device("cpu")
TEMPERATURE, TEACHER, WEIGHT = 0.2, 2.0, 0.7


def taught_batch(num_rows=9):
    """Scores of any size; some passages, and whole rows, have none."""
    rng = np.random.default_rng(4)
    batch = global_batch(num_rows, 3, 0)
    teacher_BP = rng.normal(0, 5, (num_rows, 3)).astype(np.float32)
    teacher_BP[rng.random(teacher_BP.shape) < 0.2] = np.nan
    teacher_BP[batch.passage_key_BP < 0] = np.nan
    teacher_BP[[1, 4]] = np.nan
    return replace(batch, teacher_BP=teacher_BP)


def run_step(batch, distill, budget=100_000):
    backend = Replicated(dropout_model(torch.float64, 0.0), TrainSettings())
    settings = TrainSettings(temperature=TEMPERATURE, token_budget=budget, distill=distill, distill_temperature=TEACHER)
    result = contrastive_step(backend, batch, settings, TASKS, 0, CPU)
    return result.loss, sum_(torch.cat([p.grad.flatten() for p in backend.parameters if p.grad is not None]))


def written_out(batch):
    """Mean over all rows of KL(teacher || student), row by row, and its gradient."""
    model = dropout_model(torch.float64, 0.0)
    sequences = np.split(batch.ids, np.cumsum(batch.length_S)[:-1])
    rep = torch.cat(
        [model(torch.from_numpy(s.astype(np.int64))[None], torch.ones(1, len(s), dtype=torch.long)) for s in sequences]
    )
    num_rows, total = len(batch.task_B), torch.zeros((), dtype=torch.float64)
    for i in range(num_rows):
        known = np.flatnonzero(~np.isnan(batch.teacher_BP[i]))
        if len(known):
            p = (torch.from_numpy(batch.teacher_BP[i, known]).double() / TEACHER).softmax(0)
            cosines = torch.stack([rep[i] @ rep[num_rows + 3 * i + int(k)] for k in known])
            total = total + (p * (p.log() - (cosines / TEMPERATURE).log_softmax(0))).sum()
    (total / num_rows).backward()
    return total.item() / num_rows, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("budget", [100_000, 40])
def test_the_loss_is_infonce_and_the_weighted_divergence(budget):
    batch = taught_batch()
    plain, taught, divergence = run_step(batch, 0.0), run_step(batch, WEIGHT, budget), written_out(batch)
    assert divergence[0] > 0.1
    assert taught[0] == pytest.approx(plain[0] + WEIGHT * divergence[0], rel=1e-9)
    wanted = plain[1] + WEIGHT * divergence[1]
    # Two backwards are added here, and each is rounded to float32 in the model's norms.
    assert (taught[1] - wanted).norm() <= 1e-6 * wanted.norm()


def _worker(rank, num_workers, port, out):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=num_workers)
    found = run_step(share_of(taught_batch(), rank, num_workers), WEIGHT)
    if rank == 0:
        torch.save(found, out)
    leave()


def test_the_number_of_workers_changes_nothing(tmp_path):
    mp.spawn(_worker, (2, free_port(), tmp_path / "out.pt"), nprocs=2)
    loss, gradient = torch.load(tmp_path / "out.pt")
    alone = run_step(taught_batch(), WEIGHT)
    assert loss == pytest.approx(alone[0], rel=1e-9)
    assert (gradient - alone[1]).norm() <= 1e-9 * alone[1].norm()


def test_scores_reach_the_batch_from_the_file(tmp_path):
    def passage(text, score=None):
        return {"docid": text, "text": text} | ({} if score is None else {"score": score})

    records = [
        {"query": "parse a date", "positive_passages": [passage("date", 9.5)],
         "negative_passages": [passage("list", -1), passage("list", 3), passage("time")]},
        {"query": "read a file", "positive_passages": [passage("file")], "negative_passages": [passage("write")]},
        {"query": "of", "positive_passages": [passage("the", "high")], "negative_passages": []},
    ]  # fmt: skip
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    *rows, refused = read(file)
    assert isinstance(refused, Reject) and "score must be a finite number" in refused.detail
    writer = TaskWriter(tmp_path / "store", "task", TaskInfo(), "key", None, WriteSettings(0.1, 0, 10))
    writer.add(parsed_table(rows))
    assert writer.finish().counts["scored"] == 1
    task = CollectionStore(tmp_path / "store")["task"]
    numbers, scores = ([r[name] for r in task.take_rows([0, 1]).to_pylist()] for name in ("given_negatives", "scores"))
    assert scores == [[9.5, -1.0, None], None]
    task.rows.add_columns({"negatives": "given_negatives"})
    store = CollectionStore(tmp_path / "store")
    plan = Plan([2], None, 1, 2, 0)
    recipe = BatchRecipe(
        tmp_path / "store",
        ("task",),
        (store["task"].rows.latest_version,),
        tiny_base(tmp_path / "base"),
        plan,
        3,
        teacher=True,
    )
    batch = Collator(recipe).batch(0, 0, 1)
    known = {(0, 0): 9.5, (0, numbers[0][0]): -1.0}
    for row, keys, found in zip(batch.row_B, batch.passage_key_BP, batch.teacher_BP, strict=True):
        wanted = [known.get((row, key), np.nan) for key in keys]
        np.testing.assert_array_equal(found, np.array(wanted, np.float32))
    assert versions_of([task]) and Collator(replace(recipe, teacher=False)).batch(0, 0, 1).teacher_BP is None
