"""The data plane on this machine: `PYTHONPATH=. python benchmarks/data.py [--quick] [--only PART] [--out FILE]`.

ingest    rows/s from JSON lines into the collection store (validated, numbered, without duplicates) against
          `datasets.load_dataset` + `save_to_disk` of the same files (which does none of that), in turn
delivery  tokens/s through Ray Data to two Train workers that do nothing with them; seconds from the workers' start to
          the first batch; and the share of a step that a worker waits which "computes" as long as an H200 would
memory    peak of the process tree (proportional set size) and of the object store over 300 steps drawn from all over
          stores of 1x, 4x and 16x (5 GB) the size, each in a process of its own
mining    rows/s of BM25

Text is made up: a seeded Zipf vocabulary of 20,000 words.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tdro_ray.config import ModelSettings, PolicySettings, Recipe
from tdro_ray.data.collate import BatchRecipe
from tdro_ray.types import Passage, RetrieverSpec, Row, TaskInfo

H200_TOKENS = (
    155_000  # a second: 45 % of 989 TFLOP/s, a 0.36 G-weight body (Qwen2 0.5 B), two passes (8 FLOP per weight)
)
BATCH = 256  # rows a step


# Text


class Words:
    """Seeded texts of Zipf-distributed words."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        letters = np.array(list("aeioubcdfghlmnprst"))
        self.words = np.array(["".join(self.rng.choice(letters, n)) for n in self.rng.integers(2, 11, 20_000)])
        weight = 1 / (np.arange(20_000) + 10)
        self.cumulative = np.cumsum(weight / weight.sum())

    def texts(self, count: int, low: int, high: int) -> list[str]:
        """Return `count` texts of `low` to `high` words."""
        lengths = self.rng.integers(low, high + 1, count)
        drawn = self.words[np.searchsorted(self.cumulative, self.rng.random(lengths.sum())).clip(0, 19_999)]
        return [" ".join(part) for part in np.split(drawn, np.cumsum(lengths)[:-1])]


class Noise(Words):
    """Seeded texts of random letters, which no file format makes small."""

    def texts(self, count: int, low: int, high: int) -> list[str]:
        """Return `count` texts of `low` to `high` words of six letters."""
        lengths = 7 * self.rng.integers(low, high + 1, count)
        letters = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+-", np.uint8)
        drawn = letters[self.rng.integers(0, 64, lengths.sum())]
        drawn[::7] = ord(" ")
        text, ends = drawn.tobytes().decode("ascii"), np.cumsum(lengths)
        return [text[end - length : end].strip() for end, length in zip(ends, lengths, strict=True)]


def rows_of(words: Words, count: int, negatives: int, low: int, high: int) -> Iterator[Row]:
    """Yield rows of one positive and `negatives` given negatives, all different."""
    for start in range(0, count, 1000):
        many = min(1000, count - start)
        queries, passages = words.texts(many, 4, 12), words.texts(many * (1 + negatives), low, high)
        for i in range(many):
            own = [
                Passage(f"{start + i}-{j}", p)
                for j, p in enumerate(passages[i * (1 + negatives) : (i + 1) * (1 + negatives)])
            ]
            yield Row(str(start + i), queries[i], tuple(own[:1]), tuple(own[1:]))


def write_jsonl(path: Path, count: int, seed: int) -> None:
    """Write rows as the released tDRO data has them: one positive, three negatives, about 100 words each."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows_of(Words(seed), count, 3, 40, 160):
            passages = {
                name: [{"docid": p.docid, "title": "", "text": p.text} for p in found]
                for name, found in (("positive_passages", row.positives), ("negative_passages", row.negatives))
            }
            file.write(json.dumps({"_id": row.id, "text": row.query, **passages}) + "\n")


def write_store(
    store: Path, tasks: int, rows: int, negatives: int, low: int, high: int, kind: type[Words] = Words
) -> int:
    """Write tasks straight into a store, their given negatives as mined ones; return its bytes on disk."""
    import lance

    from tdro_ray.data.parsed import parsed_table
    from tdro_ray.data.publish import write_manifest
    from tdro_ray.data.writer import TaskWriter, WriteSettings

    for task in range(tasks):
        writer = TaskWriter(store, f"task{task}", TaskInfo(), "made", None, WriteSettings(0.0, 0, 0, PolicySettings()))
        pending: list[Row] = []
        for row in rows_of(kind(task), rows, negatives, low, high):
            pending.append(row)
            if len(pending) == 1000:
                writer.add(parsed_table(pending))
                pending = []
        if pending:
            writer.add(parsed_table(pending))
        manifest, rows_path = writer.finish(), store / f"task{task}" / "rows.lance"
        dataset = lance.dataset(str(rows_path))
        dataset.add_columns({"negatives": "given_negatives"})
        write_manifest(rows_path.parent, replace(manifest, negatives={"version": dataset.version}))
    return sum(p.stat().st_size for p in store.rglob("*") if p.is_file())


def batch_recipe(store: Path, base: Path, steps: int, negatives: int) -> BatchRecipe:
    """A homogeneous plan over all tasks of a store."""
    import lance

    from tdro_ray.data.collection import CollectionStore
    from tdro_ray.data.plan import Plan

    found = CollectionStore(store).collections()
    versions = tuple(lance.dataset(str(c.folder / "rows.lance")).version for c in found)
    plan = Plan([c.manifest.rows for c in found], None, steps, BATCH, 0, "homogeneous", None)
    return BatchRecipe(store, tuple(c.name for c in found), versions, base, plan, negatives)


def write_base(folder: Path) -> Path:
    """A tiny model: only its tokenizer and its lengths are used here."""
    from tdro_ray.model.build import build_base

    spec = RetrieverSpec(pooling="mean", query_length=64, passage_length=256)
    build_base(ModelSettings(pooling="mean"), spec, iter(Words(99).texts(3000, 40, 160)), folder, 0)
    return folder


@contextlib.contextmanager
def started_ray() -> Iterator[None]:
    """Ray on this machine as the product starts it, at the number of CPUs that there are."""
    import ray

    from cluster import session
    from tdro_ray.config import ScaleSettings

    session.connect(ScaleSettings())
    try:
        yield
    finally:
        ray.shutdown()


# Ingest


def compare_ingest(files: int, rows: int, rounds: int) -> dict[str, Any]:
    """Rows per second of ours and of `datasets`, one warm-up round each aside."""
    from tdro_ray.data.ingest import ingest

    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as folder, started_ray():
        root = Path(folder)
        for i in range(files):
            (root / "source" / f"task{i}").mkdir(parents=True)
            write_jsonl(root / "source" / f"task{i}" / "train.jsonl", rows, i)
        size = sum(p.stat().st_size for p in (root / "source").rglob("*.jsonl"))
        recipe = Recipe.model_validate({"name": "bench", "data": {"sources": [str(root / "source")], "dev_queries": 0}})
        for _ in range(rounds + 1):
            began = time.perf_counter()
            manifests = ingest(recipe, root / "store")
            ours.append(files * rows / (time.perf_counter() - began))
            assert sum(m.rows for m in manifests.values()) == files * rows
            shutil.rmtree(root / "store")
            theirs.append(_their_ingest(root, files, rows))
    return {
        "rows": files * rows, "mb": size / 2**20, "ours_rows_per_s": ours[1:], "datasets_rows_per_s": theirs[1:],
        "ratio": statistics.median(ours[1:]) / statistics.median(theirs[1:]),
    }  # fmt: skip


def _their_ingest(root: Path, files: int, rows: int) -> float:
    import datasets

    datasets.disable_progress_bars()
    began = time.perf_counter()
    for i in range(files):
        given = {"data_files": str(root / "source" / f"task{i}" / "train.jsonl"), "cache_dir": str(root / "cache")}
        loaded = datasets.load_dataset("json", split="train", **given)
        loaded.save_to_disk(str(root / "theirs" / f"task{i}"))
        assert len(loaded) == rows
    seconds = time.perf_counter() - began
    shutil.rmtree(root / "cache")
    shutil.rmtree(root / "theirs")
    return files * rows / seconds


# Delivery


def deliver(recipe: BatchRecipe, num_workers: int, tokens_per_s: float | None) -> dict[str, Any]:
    """Deliver a plan to Train workers that sleep as long as `tokens_per_s` would compute (None: not at all)."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from tdro_ray.data.stream import PlanDataConfig

    with tempfile.TemporaryDirectory() as storage:
        trainer = TorchTrainer(
            _consume,
            train_loop_config={"tokens_per_s": tokens_per_s},
            scaling_config=ScalingConfig(num_workers=num_workers, resources_per_worker={"CPU": 0.5}),
            datasets={"train": _no_dataset},
            dataset_config=PlanDataConfig(recipe, f"{storage}/deliver", 0.25, "deliver"),
            run_config=RunConfig(name="deliver", storage_path=storage),
        )
        return dict(trainer.fit().return_value)


def _no_dataset() -> None:
    """Stand-in: the plan's dataset is made by PlanDataConfig."""


def _consume(config: dict[str, Any]) -> dict[str, Any]:
    """A worker: first-batch time, tokens after it, seconds waited and worked. Summed over the workers."""
    import ray.train
    import torch

    from tdro_ray.data.stream import batches_of
    from tdro_ray.train.comm import sum_

    began = time.perf_counter()
    rank = ray.train.get_context().get_world_rank()
    first = tokens = steps = 0
    waited = worked = 0.0
    asked = began
    for expected, batch in enumerate(batches_of(ray.train.get_dataset_shard("train"))):
        assert (batch.step, batch.rank) == (expected, rank)
        got = time.perf_counter()
        if expected == 0:
            first = got - began
            start = got
        else:
            waited += got - asked
            tokens += int(batch.length_S.sum())
            steps += 1
        if config["tokens_per_s"]:
            time.sleep(float(batch.length_S.sum()) / config["tokens_per_s"])
            worked += time.perf_counter() - got if expected else 0.0
        asked = time.perf_counter()
    seconds = time.perf_counter() - start
    total = sum_(torch.tensor([tokens, waited, worked, first, 1.0], dtype=torch.float64)).tolist()
    return {
        "tokens_per_s": total[0] / seconds, "steps": steps, "wait_share": total[1] / max(1e-9, total[1] + total[2]),
        "first_batch_s": total[3] / total[4],
    }  # fmt: skip


def measure_delivery(rows: int, steps: int, rounds: int) -> dict[str, Any]:
    """Two workers at full speed, and one that computes as an H200 would, in turn."""
    full, paced = [], []
    with tempfile.TemporaryDirectory() as folder, started_ray():
        base = write_base(Path(folder) / "base")
        write_store(Path(folder) / "store", 4, rows, 3, 40, 160)
        recipe = batch_recipe(Path(folder) / "store", base, steps, 1)
        for _ in range(rounds):
            full.append(deliver(recipe, 2, None))
            paced.append(deliver(recipe, 1, H200_TOKENS))
    return {"full": full, "paced": paced, "h200_tokens_per_s": H200_TOKENS, "rows": 4 * rows, "steps": steps}


# Memory


class Watch(threading.Thread):
    """Samples the proportional set size of a process and all that it started, and the object store's use."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = self.store = 0
        self.done = threading.Event()

    def run(self) -> None:
        import psutil

        me = psutil.Process()
        while not self.done.wait(0.5):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                with contextlib.suppress(psutil.Error, OSError):
                    total += process.memory_full_info().pss
            self.peak = max(self.peak, total)
            with contextlib.suppress(Exception):  # the head may be on its way up or down
                self.store = max(self.store, _object_store_used())


def _object_store_used() -> int:
    import ray

    total, free = ray.cluster_resources(), ray.available_resources()
    return int(total.get("object_store_memory", 0) - free.get("object_store_memory", 0))


def peak_memory(store: Path, base: Path, steps: int) -> dict[str, Any]:
    """Run in a process of its own: peaks of 300 steps through two workers."""
    watch = Watch()
    with started_ray():
        import ray

        watch.start()
        found = deliver(batch_recipe(store, base, steps, 1), 2, None)
        watch.done.set()
        watch.join()
        limit = int(ray.cluster_resources()["object_store_memory"])
    return {
        "peak_mb": watch.peak / 2**20, "object_store_mb": watch.store / 2**20, "object_store_limit_mb": limit / 2**20,
        "tokens_per_s": found["tokens_per_s"],
    }  # fmt: skip


def compare_memory(smallest_rows: int, steps: int, factors: tuple[int, ...]) -> list[dict[str, Any]]:
    """The same plan length over stores of 1x, 4x and 16x the rows; texts of about 2 KB."""
    found = []
    for factor in factors:
        with tempfile.TemporaryDirectory() as folder:
            base = write_base(Path(folder) / "base")
            size = write_store(Path(folder) / "store", 4, smallest_rows * factor // 4, 3, 240, 360, Noise)
            command = [sys.executable, __file__, "--peak", str(Path(folder) / "store"), str(base), str(steps)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=1800, check=True)
            found.append({"store_gb": size / 1e9, **json.loads(done.stdout.splitlines()[-1])})
    return found


# Mining


def measure_mining(rows: int, rounds: int) -> dict[str, Any]:
    """Rows per second of BM25 over tasks of that many rows, each with four passages."""
    from tdro_ray.data.mine import mine

    rates = []
    recipe = Recipe.model_validate({"name": "bench", "data": {"sources": ["made"]}})
    with tempfile.TemporaryDirectory() as folder, started_ray():
        for i in range(rounds + 1):
            store = Path(folder) / f"store{i}"
            write_store(store, 2, rows, 3, 40, 160)
            _forget_negatives(store)
            began = time.perf_counter()
            mine(recipe, store, ["task0", "task1"])
            rates.append(2 * rows / (time.perf_counter() - began))
    return {"rows": 2 * rows, "passages": 8 * rows, "rows_per_s": rates[1:]}


def _forget_negatives(store: Path) -> None:
    import lance

    for rows in store.glob("*/rows.lance"):
        lance.dataset(str(rows)).drop_columns(["negatives"])


# Report


def spread(values: list[float], digits: int = 0) -> str:
    return f"{statistics.median(values):12,.{digits}f}  ({min(values):,.{digits}f} to {max(values):,.{digits}f}, n={len(values)})"


def show(found: dict[str, Any]) -> str:
    lines = []
    if part := found.get("ingest"):
        lines += [
            f"ingest of {part['rows']:,} rows, {part['mb']:,.0f} MiB of JSON lines",
            f"  ours, rows/s                  {spread(part['ours_rows_per_s'])}",
            f"  datasets, rows/s              {spread(part['datasets_rows_per_s'])}",
            f"  ratio                         {part['ratio']:12.2f}",
        ]
    if part := found.get("delivery"):
        full, paced = part["full"], part["paced"]
        lines += [
            f"delivery of {part['steps']} steps of {BATCH} rows",
            f"  2 workers, tokens/s           {spread([f['tokens_per_s'] for f in full])}  goal 200,000",
            f"  first batch, s                {spread([f['first_batch_s'] for f in full], 1)}  goal 15",
            f"  wait at an H200's speed, %    {spread([100 * p['wait_share'] for p in paced], 2)}  goal 2; {H200_TOKENS:,} tokens/s, 1 worker",
        ]
    for part in found.get("memory", []):
        lines.append(
            f"store of {part['store_gb']:5.2f} GB: peak {part['peak_mb']:,.0f} MiB, object store {part['object_store_mb']:,.0f} "
            f"of {part['object_store_limit_mb']:,.0f} MiB, {part['tokens_per_s']:,.0f} tokens/s"
        )
    if part := found.get("mining"):
        lines.append(f"BM25 mining, rows/s             {spread(part['rows_per_s'])}  {part['passages']:,} passages")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small files and stores: some minutes")
    parser.add_argument("--only", choices=["ingest", "delivery", "memory", "mining"], help="one of the parts")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.peak:
        print(json.dumps(peak_memory(Path(chosen.peak[0]), Path(chosen.peak[1]), int(chosen.peak[2]))))
        return
    quick = chosen.quick
    parts = {
        "ingest": lambda: compare_ingest(4, 2_500 if quick else 25_000, 2 if quick else 3),
        "delivery": lambda: measure_delivery(2_000 if quick else 20_000, 60 if quick else 300, 1 if quick else 3),
        "memory": lambda: compare_memory(
            2_000 if quick else 50_000, 60 if quick else 300, (1, 4) if quick else (1, 4, 16)
        ),
        "mining": lambda: measure_mining(1_000 if quick else 10_000, 1 if quick else 3),
    }
    found: dict[str, Any] = {"quick": quick, "cpus": os.cpu_count()}
    for name, measure in parts.items():
        if chosen.only in (None, name):
            found[name] = measure()
            print(show({name: found[name]}), flush=True)
            if chosen.out:
                chosen.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
