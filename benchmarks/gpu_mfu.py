"""How much of a GPU's arithmetic training uses: `PYTHONPATH=. python benchmarks/gpu_mfu.py [--tiny] [--out FILE]`.

Needs torch, transformers, peft and numpy (pydantic and PyYAML for the settings); no Ray, no Lance, no network: random
weights of the shape of Qwen2 0.5 B, made-up token ids of mixed lengths, the product's own loop (`train/loop.py`) through
`LocalContext`.

two passes    stage 2, batch beyond the token budget: share of the dense peak, the first pass counted as work
single pass   stage 2, batch within the budget: model FLOP utilisation
stage 1       a step with stored reference similarities against one that runs the reference model
packed        the two-pass step with sequences end to end (the default where the GPU has the kernel) against padded ones
compiled      the two-pass step with compiled blocks against plain ones, only with --compile
memory        peak against the number of queries in a batch
official      2,048 queries with 8 passages of up to 512 tokens each, extrapolated to 1,000 steps

Work is counted on real tokens only, so padding lowers every share: 2 operations per weight and token (embeddings look
up, they do not multiply), 2 T^2 h per layer and sequence of T tokens for causal attention; a backward is two forwards.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tdro_ray.config import ModelSettings, OptimizeSettings, TrainSettings
from tdro_ray.data.collate import Batch
from tdro_ray.model.encoder import Encoder, load_retriever
from tdro_ray.model.tokenize import write_spec
from tdro_ray.retrieval.chunks import chunk_tokens, graph_tokens, padded_tokens
from tdro_ray.retrieval.grad_cache import plan_chunks
from tdro_ray.train.context import LocalContext
from tdro_ray.train.loop import TrainJob, train
from tdro_ray.train.prepare import speed_up
from tdro_ray.train.step import TaskSettings
from tdro_ray.types import RetrieverSpec

PEAKS = {"H200": 989e12, "H100 80GB HBM3": 989e12, "H100 PCIe": 756e12, "A100": 312e12}  # dense bf16, NVIDIA's sheets
TASKS = TaskSettings(("a", "b"), (1_000_000, 1_000_000), (None, None), (True, True))
NO_GPU = "No GPU: these figures mean nothing about speed, they show only that the benchmark runs."


@dataclass(frozen=True)
class Shape:
    """A Qwen2 and what it is trained on."""

    vocab: int = 151_936
    hidden: int = 896
    layers: int = 24
    heads: int = 14
    kv_heads: int = 2
    intermediate: int = 4864
    query_length: int = 128  # tokens, at most
    passage_length: int = 512  # tokens, at most
    token_budget: int = 16_384
    queries: tuple[int, ...] = (128, 512, 2048)  # batch sizes whose memory is compared; the last is the official one
    steps: int = 5  # timed, after one that warms up


TINY = Shape(128, 32, 2, 2, 1, 64, 8, 16, 256, (4, 8, 16), 2)


@dataclass(frozen=True)
class Bench:
    """What every measurement needs."""

    shape: Shape
    base: Path  # model folder
    device: str
    dtype: str
    weights: int  # of the matrices that every token is multiplied with
    peak: float  # FLOP/s


class Enough(Exception):
    """Ends a timed run before its last step, so that no checkpoint is timed."""


# The model and its batches


def write_model(shape: Shape, folder: Path, dtype: str) -> int:
    """Write a model folder with random weights and return how many weights multiply every token."""
    from transformers import Qwen2Config, Qwen2Model

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate,
        max_position_embeddings=max(shape.query_length, shape.passage_length),
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = Qwen2Model(config).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    lengths = {"query_length": shape.query_length, "passage_length": shape.passage_length}
    write_spec(folder, RetrieverSpec(eos_token_id=1, pad_token_id=0, **lengths))
    return sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)


def made_up(shape: Shape, queries: int, passages: int, stage1: bool = False) -> Batch:
    """Return a whole batch: lengths uniform from half the limit to the limit, all passages different."""
    rng = np.random.default_rng(0)
    limit_S = np.repeat([shape.query_length, shape.passage_length], [queries, queries * passages])
    length_S = rng.integers(limit_S // 2, limit_S + 1).astype(np.int64)
    ids = rng.integers(2, shape.vocab, int(length_S.sum())).astype(np.int32)
    key_BP = np.arange(queries * passages, dtype=np.int64).reshape(queries, passages)
    task_B = np.arange(queries) % 2 if stage1 else np.zeros(queries, np.int64)
    reference_BP = rng.uniform(-1, 1, key_BP.shape).astype(np.float32) if stage1 else None
    return Batch(0, 0, task_B, np.arange(queries), key_BP, key_BP[:, :1], ids, length_S, reference_BP)


# Work


def forward_flops(shape: Shape, weights: int, length_S: np.ndarray) -> float:
    """Return the operations of one forward over sequences of these lengths (see the module's first lines)."""
    length_S = length_S.astype(np.float64)
    return float(2 * weights * length_S.sum() + 2 * shape.layers * shape.hidden * (length_S**2).sum())


def passes_of(bench: Bench, batch: Batch, packing: bool | str = "auto") -> tuple[bool, bool, float]:
    """Return (whether the step keeps the whole graph, whether it packs, its padded tokens per real token), as the step
    decides it."""
    budget = bench.shape.token_budget
    retriever = load_retriever(bench.base, bench.dtype).to(bench.device)
    model = ModelSettings(dtype=bench.dtype, packing=packing)
    packed = speed_up(retriever, model, "ddp", torch.device(bench.device)).packed
    kept = graph_tokens(budget, bench.device, retriever.bytes_per_token)
    chunks, one_pass = plan_chunks(batch.length_S, kept, chunk_tokens(budget, bench.device), packed)
    return one_pass, packed, padded_tokens(batch.length_S, chunks, packed) / float(batch.length_S.sum())


def peak_of(device: str) -> tuple[float, str]:
    """Return (FLOP/s that a device can reach, where the figure comes from)."""
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    known = next((peak for part, peak in PEAKS.items() if part in name), None)
    if known:
        return known, f"dense bf16 peak of {name}"
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (512, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(10):
        _wait(device)
        began = time.perf_counter()
        a @ b
        _wait(device)
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds), f"measured on a {size} x {size} {dtype} product: {name} is in no table"


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# Measurements


def step_seconds(
    bench: Bench,
    settings: TrainSettings,
    batch: Batch,
    steps: int,
    warm: int = 1,
    prepare: Callable[[Batch], Batch] = lambda batch: batch,
    **options: Any,
) -> list[float]:
    """Seconds of each of `steps` steps of the loop after `warm` others; `prepare` is counted. `options` of the model."""
    times: list[float] = []

    def batches(start: int) -> Iterator[Batch]:
        for step in range(start, steps + warm):
            _wait(bench.device)
            times.append(time.perf_counter())
            yield prepare(replace(batch, step=step))
        _wait(bench.device)
        times.append(time.perf_counter())
        raise Enough

    settings = settings.model_copy(update={"steps": steps + warm + 1, "checkpoint_every": steps + warm + 1})
    with tempfile.TemporaryDirectory() as out:
        model = ModelSettings(dtype=bench.dtype, **options)
        job = TrainJob("mfu", bench.base, Path(out), settings, model, TASKS, seed=0)
        with contextlib.suppress(Enough):
            train(job, LocalContext(batches, Path(out) / "checkpoints", bench.device))
    return np.diff(times)[warm:].tolist()


def utilisation(bench: Bench, queries: int) -> dict[str, Any]:
    """Stage 2 with one hard negative: time, rate, and both ways of counting its work."""
    batch = made_up(bench.shape, queries, 2)
    one_pass, packed, padding = passes_of(bench, batch)
    settings = TrainSettings(batch_size=queries, temperature=0.05, token_budget=bench.shape.token_budget)
    seconds = step_seconds(bench, settings, batch, bench.shape.steps)
    step_s, forward = statistics.median(seconds), forward_flops(bench.shape, bench.weights, batch.length_S)
    return {
        "queries": queries, "tokens": int(batch.length_S.sum()), "single_pass": one_pass, "packed": packed, "padded_per_token": padding,
        "step_s": seconds, "tokens_per_s": float(batch.length_S.sum()) / step_s,
        "share_of_peak": (3 if one_pass else 4) * forward / step_s / bench.peak, "mfu": 3 * forward / step_s / bench.peak,
    }  # fmt: skip


def compare_options(
    bench: Bench, queries: int, rounds: int, one: dict[str, Any], other: dict[str, Any]
) -> dict[str, Any]:
    """Seconds of stage-2 steps under two sets of model options, in turn."""
    batch = made_up(bench.shape, queries, 2)
    settings = TrainSettings(batch_size=queries, temperature=0.05, token_budget=bench.shape.token_budget)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for seconds, options in zip(times, (one, other), strict=True):
            seconds += step_seconds(bench, settings, batch, bench.shape.steps, warm=2, **options)
    padding = passes_of(bench, batch, packing=False)[2]
    return {
        "queries": queries,
        "padded_per_token": padding,
        "one_s": times[0],
        "other_s": times[1],
        "ratio": statistics.median(times[0]) / statistics.median(times[1]),
    }


def stage1(bench: Bench, queries: int) -> dict[str, Any]:
    """Seconds of a stage-1 step with stored similarities, and of one that embeds the batch with a reference first."""
    batch = made_up(bench.shape, queries, 8, stage1=True)
    budget = bench.shape.token_budget
    settings = OptimizeSettings(batch_size=queries, temperature=0.05, token_budget=budget)
    stored = step_seconds(bench, settings, batch, bench.shape.steps)
    reference = Encoder(load_retriever(bench.base, bench.dtype), None, bench.device)  # embeds token ids: no tokenizer

    def embedded(batch: Batch) -> Batch:
        vectors = reference.embed_ids(np.split(batch.ids, np.cumsum(batch.length_S)[:-1]), budget)
        query_BD, passage_BPD = vectors[:queries], vectors[queries:].reshape(queries, 8, -1)
        return replace(batch, reference_BP=np.einsum("bd,bpd->bp", query_BD, passage_BPD))

    run = step_seconds(bench, settings, batch, bench.shape.steps, prepare=embedded)
    ratio = statistics.median(stored) / statistics.median(run)
    return {"queries": queries, "with_scores_s": stored, "with_reference_s": run, "ratio": ratio}


def peak_memory(bench: Bench) -> dict[str, float]:
    """Peak MiB of a stage-2 step by number of queries, smallest batch first: a CPU's peak is the process's, never lower."""
    found = {}
    for queries in bench.shape.queries:
        if bench.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        settings = TrainSettings(batch_size=queries, temperature=0.05, token_budget=bench.shape.token_budget)
        step_seconds(bench, settings, made_up(bench.shape, queries, 2), steps=1, warm=0)
        cpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        found[str(queries)] = torch.cuda.max_memory_allocated() / 2**20 if bench.device == "cuda" else cpu
    return found


def official(bench: Bench) -> dict[str, Any]:
    """One stage-2 step of the published shape (under --tiny a small one), times 1,000."""
    queries = bench.shape.queries[-1]
    batch = made_up(bench.shape, queries, 8)
    settings = TrainSettings(
        batch_size=queries, num_negatives=7, temperature=0.05, token_budget=bench.shape.token_budget
    )
    (step_s,) = step_seconds(bench, settings, batch, steps=1, warm=0)
    return {
        "queries": queries, "passages": 8, "tokens": int(batch.length_S.sum()), "step_s": step_s,
        "hours_of_1000_steps": step_s / 3.6,
    }  # fmt: skip


def measure(shape: Shape, device: str, compiled: bool = False) -> dict[str, Any]:
    """Return all figures."""
    torch.set_float32_matmul_precision("high")
    dtype = "bfloat16" if device == "cuda" else "float32"
    peak, peak_from = peak_of(device)
    row = shape.query_length + 2 * shape.passage_length  # tokens of a query and its two passages, at most
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(shape, Path(folder), device, dtype, write_model(shape, Path(folder), dtype), peak)
        many = max(shape.queries[0], 4 * shape.token_budget // row)
        plain_and_compiled = {"compile": True}, {"compile": False}
        return {
            "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
            "note": "" if device == "cuda" else NO_GPU,
            "torch": torch.__version__, "dtype": dtype, "shape": asdict(shape),
            "peak_tflops": peak / 1e12, "peak_from": peak_from,
            "two_passes": utilisation(bench, many),
            "single_pass": utilisation(bench, max(1, shape.token_budget // row)),
            "stage1": stage1(bench, max(2, shape.queries[0] // 4)),
            "packed": compare_options(bench, many, 2, {"packing": True}, {"packing": False}),
            "compiled": compare_options(bench, many, 2, *plain_and_compiled) if compiled else None,
            "peak_memory_mb": peak_memory(bench),
            "official": official(bench),
        }  # fmt: skip


def show(found: dict[str, Any]) -> str:
    """Return the figures as a table."""
    two, one, first, whole = (found[key] for key in ("two_passes", "single_pass", "stage1", "official"))
    packed, compiled = found["packed"], found["compiled"]
    rows = [
        ("peak, TFLOP/s", f"{found['peak_tflops']:.1f}", found["peak_from"]),
        (
            "two passes: share of peak",
            f"{two['share_of_peak']:.1%}",
            f"goal 45 %; MFU {two['mfu']:.1%}, {two['tokens_per_s']:,.0f} tokens/s",
        ),
        ("single pass: MFU", f"{one['mfu']:.1%}", f"goal 40 %; {one['tokens_per_s']:,.0f} tokens/s"),
        (
            "stage 1, stored scores, s",
            f"{statistics.median(first['with_scores_s']):.3f}",
            f"{first['queries']} queries",
        ),
        ("stage 1, reference model, s", f"{statistics.median(first['with_reference_s']):.3f}", "forward in the step"),
        ("  ratio", f"{first['ratio']:.2f}", "goal at most 0.8"),
        *((f"peak MiB at {n} queries", f"{mb:,.0f}", "") for n, mb in found["peak_memory_mb"].items()),
        (
            "official shape, s a step",
            f"{whole['step_s']:.2f}",
            f"{whole['queries']:,} queries x {whole['passages']} passages, {whole['tokens']:,} tokens",
        ),
        ("  1,000 steps, hours", f"{whole['hours_of_1000_steps']:.2f}", "extrapolated"),
        ("packed, s a step", f"{statistics.median(packed['one_s']):.3f}", f"{packed['queries']} queries, two passes"),
        (
            "  ratio to padded",
            f"{packed['ratio']:.2f}",
            f"padding adds {packed['padded_per_token'] - 1:.1%} tokens",
        ),
        *([("compiled, ratio to plain", f"{compiled['ratio']:.2f}", "")] if compiled else []),
    ]
    unlike = (
        [] if two["single_pass"] is False and one["single_pass"] else ["the step chose other passes than asked for"]
    )
    head = [f"{found['device']}, {found['dtype']}, torch {found['torch']}", *([found["note"]] if found["note"] else [])]
    return "\n".join([*head, *unlike, *(f"{name:<30} {value:>10}  {remark}".rstrip() for name, value, remark in rows)])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="the same on the CPU with a tiny shape, in seconds")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument(
        "--compile", action="store_true", help="compare with compiled blocks too; compiling takes minutes"
    )
    parser.add_argument("--token-budget", type=int, help=f"padded tokens of a forward (default {Shape.token_budget:,})")
    chosen = parser.parse_args(arguments)
    if not chosen.tiny and not torch.cuda.is_available():
        sys.exit("No GPU here, and figures of a CPU would mean nothing. --tiny shows on a CPU that the benchmark runs.")
    from transformers.utils import logging

    logging.disable_progress_bar()
    shape = TINY if chosen.tiny else Shape()
    if chosen.token_budget:
        shape = replace(shape, token_budget=chosen.token_budget)
    found = measure(shape, "cpu" if chosen.tiny else "cuda", chosen.compile)
    print(show(found))
    if chosen.out:
        chosen.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
