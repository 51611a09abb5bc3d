"""A tiny model, a tokenizer and made-up batches for the tests of the training room. No Ray, no Lance, no store."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from tdro_ray.config import ModelSettings, TinyModel
from tdro_ray.data.collate import Batch
from tdro_ray.data.plan import shares
from tdro_ray.model.build import build_base
from tdro_ray.model.encoder import Retriever
from tdro_ray.train.step import TaskSettings
from tdro_ray.types import RetrieverSpec

TASKS = TaskSettings(
    names=("a", "b", "c"), sizes=(40, 30, 20), temperatures=(None, 0.1, None), in_batch=(True, True, False)
)
WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "parse",
    "read",
    "write",
    "file",
    "date",
    "time",
    "list",
    "of",
    "the",
    "a",
    "to",
    "in",
    "on",
]


def tiny_base(folder: Path, seed: int = 0, **spec: object) -> Path:
    """Write a base model folder of a few thousand parameters."""
    tiny = TinyModel(hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24, vocab_size=300)
    rng = np.random.default_rng(seed)
    texts = (" ".join(rng.choice(WORDS, 8)) for _ in range(50))
    build_base(
        ModelSettings(tiny=tiny),
        RetrieverSpec(**{"query_length": 16, "passage_length": 32, **spec}),
        texts,
        folder,
        seed,
    )
    return folder


def dropout_model(dtype: torch.dtype, dropout: float) -> Retriever:
    """A tiny Qwen2 whose attention has dropout, in `dtype`."""
    from transformers import Qwen2Config, Qwen2Model

    torch.manual_seed(3)
    config = Qwen2Config(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=24,
        attention_dropout=dropout,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return Retriever(Qwen2Model(config).to(dtype), RetrieverSpec(pooling="mean")).train()


def global_batch(num_rows: int, num_passages: int, task: int | None, seed: int = 0, step: int = 0) -> Batch:
    """A whole step's batch of random tokens; `task` None mixes tasks and carries reference similarities.

    Some passages are equal across rows, some rows have two positives, some lack a negative.
    """
    rng = np.random.default_rng((seed, step))
    task_N = np.full(num_rows, task) if task is not None else rng.integers(0, 3, num_rows)
    key_NP = rng.integers(0, max(4, num_rows), (num_rows, num_passages)).astype(np.int64)
    if num_passages > 1:
        key_NP[rng.random(num_rows) < 0.15, -1] = -1
    positive_NK = np.stack(
        [key_NP[:, 0], np.where(rng.random(num_rows) < 0.3, rng.integers(0, num_rows, num_rows), -1)], 1
    )
    length_S = rng.integers(2, 12, num_rows * (1 + num_passages))
    ids = [rng.integers(2, 50, n).astype(np.int32) for n in length_S]
    for at, key in enumerate(key_NP.ravel()):  # equal keys are equal passages
        tokens = np.random.default_rng(int(key) + 7).integers(2, 50, 3 + abs(int(key)) % 8).astype(np.int32)
        ids[num_rows + at] = tokens
    length_S = np.array([len(i) for i in ids], np.int64)
    reference = rng.uniform(-1, 1, key_NP.shape).astype(np.float32) if task is None else None
    return Batch(step, 0, task_N, np.arange(num_rows), key_NP, positive_NK, np.concatenate(ids), length_S, reference)


def share_of(batch: Batch, rank: int, num_workers: int) -> Batch:
    """One worker's share of a whole batch."""
    num_rows, width = batch.passage_key_BP.shape
    part = shares(num_rows, num_workers)[rank]
    sequences = np.split(batch.ids, np.cumsum(batch.length_S)[:-1])
    mine = sequences[:num_rows][part] + sequences[num_rows + part.start * width : num_rows + part.stop * width]
    return Batch(
        batch.step,
        rank,
        batch.task_B[part],
        batch.row_B[part],
        batch.passage_key_BP[part],
        batch.positive_key_BK[part],
        np.concatenate(mine),
        np.array([len(s) for s in mine], np.int64),
        None if batch.reference_BP is None else batch.reference_BP[part],
        None if batch.probe is None else share_of(batch.probe, rank, num_workers),
        None if batch.teacher_BP is None else batch.teacher_BP[part],
    )


def probed_batch(num_rows: int, num_passages: int, num_probed: int, step: int = 0) -> Batch:
    """A stage-1 batch that is trained on without reference similarities, and measured on other rows that have them."""
    probe = global_batch(num_probed, num_passages, None, seed=9, step=step)
    return replace(global_batch(num_rows, num_passages, None, step=step), reference_BP=None, probe=probe)


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def leave() -> None:
    """End a worker process of a test that has done its work, after the others have too.

    An ordinary exit takes down torch's own threads, which on a busy machine now and then aborts the process ("terminate
    called without an active exception").
    """
    import os

    import torch.distributed as dist

    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)
