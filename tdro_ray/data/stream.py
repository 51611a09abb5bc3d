"""The plan as a Ray Dataset: one block per (step, worker), made by the data task that fetches and tokenises it.

A block of its own per worker's share keeps order and rank exact without a repartition: row k of step s reaches worker
k (the loop asserts it). The number of workers is known only when the worker group has started, in
`PlanDataConfig.configure`, which is also where a restarted run learns from which step to go on.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import pyarrow as pa
import ray
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.train import DataConfig

from tdro_ray.data.collate import Batch, BatchRecipe, Collator
from tdro_ray.data.ray_data import quiet

SCHEMA = pa.schema([("step", pa.int64()), ("rank", pa.int64()), ("batch", pa.binary())])


class PlanSource(Datasource):
    """Read tasks for the steps `start` … of a plan, one for each worker's share, in order."""

    def __init__(self, recipe: BatchRecipe, start: int, num_workers: int) -> None:
        super().__init__()
        self._recipe, self._start, self._num_workers = pickle.dumps(recipe), start, num_workers
        self._stop = recipe.plan.num_steps

    def get_name(self) -> str:
        return "TrainingPlan"

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        reference = ray.put(self._recipe)
        return [
            ReadTask(_Share(reference, step, rank, self._num_workers), BlockMetadata(1, None, None, None))
            for step in range(self._start, self._stop)
            for rank in range(self._num_workers)
        ]


class _Share:
    """Makes one block: the share of one worker in one step."""

    def __init__(self, recipe: Any, step: int, rank: int, num_workers: int) -> None:
        self.recipe, self.step, self.rank, self.num_workers = recipe, step, rank, num_workers

    def __call__(self) -> list[pa.Table]:
        batch = _collator(ray.get(self.recipe)).batch(self.step, self.rank, self.num_workers)
        columns = [[self.step], [self.rank], [pickle.dumps(batch, protocol=5)]]
        return [pa.table(columns, schema=SCHEMA)]


@lru_cache(maxsize=2)
def _collator(recipe: bytes) -> Collator:
    """Open stores and tokenizer once per data process."""
    return Collator(pickle.loads(recipe))


def plan_dataset(recipe: BatchRecipe, start: int, num_workers: int, cpus_per_task: float) -> ray.data.Dataset:
    """Return the dataset of (step, rank, batch) rows from step `start` on."""
    count = (recipe.plan.num_steps - start) * num_workers
    dataset = ray.data.read_datasource(
        PlanSource(recipe, start, num_workers), override_num_blocks=max(1, count), num_cpus=cpus_per_task
    )
    dataset.context.execution_options.preserve_order = True  # set here too: the caller's context may be another
    return dataset


class PlanDataConfig(DataConfig):
    """Gives every Train worker its shares of the plan's steps, from the newest checkpoint's step on."""

    def __init__(self, recipe: BatchRecipe, run_folder: str, cpus_per_task: float, name: str) -> None:
        super().__init__()
        self._recipe, self._run_folder, self._cpus, self._dataset_name = recipe, run_folder, cpus_per_task, name

    def configure(
        self, datasets: Any, world_size: int, worker_handles: Any, worker_node_ids: Any, **kwargs: Any
    ) -> list[dict[str, Any]]:
        quiet()
        start = checkpointed_step(self._run_folder)
        dataset = plan_dataset(self._recipe, start, world_size, self._cpus)
        dataset.set_name(self._dataset_name)
        return [{"train": split} for split in dataset.streaming_split(world_size, equal=True)]


def checkpointed_step(run_folder: str) -> int:
    """Return the step of the newest checkpoint that Ray Train noted under its run folder (path or URL), or 0."""
    from pyarrow import fs

    filesystem, path = fs.FileSystem.from_uri(run_folder) if "://" in run_folder else (fs.LocalFileSystem(), run_folder)
    snapshot = f"{path.rstrip('/')}/checkpoint_manager_snapshot.json"
    if filesystem.get_file_info(snapshot).type == fs.FileType.NotFound:
        return 0
    with filesystem.open_input_stream(snapshot) as file:
        latest = json.loads(file.read()).get("latest_checkpoint_result")
    return int(latest["metrics"]["step"]) if latest else 0


def batches_of(shard: Any) -> Iterator[Batch]:
    """Yield the batches of a worker's dataset shard. The first is asked for at once, beside whatever the caller does next."""
    tables = iter(shard.iter_batches(batch_size=1, prefetch_batches=2, batch_format="pyarrow"))
    pool = ThreadPoolExecutor(1, thread_name_prefix="first-batch")
    first = pool.submit(next, tables, None)
    pool.shutdown(wait=False)
    return _unpacked(first, tables)


def _unpacked(first: Future[Any], tables: Iterator[pa.Table]) -> Iterator[Batch]:
    table = first.result()
    while table is not None:
        yield pickle.loads(table["batch"][0].as_buffer())
        table = next(tables, None)


def local_batches(recipe: BatchRecipe, start: int) -> Iterator[Batch]:
    """Yield whole batches in this process, without Ray Data."""
    collator = Collator(recipe)
    for step in range(start, recipe.plan.num_steps):
        yield collator.batch(step, 0, 1)
