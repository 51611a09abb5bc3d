"""Reference similarities of exactly the rows and negatives that stage 1 will draw (a Ray Data actor pool).

Similarities, not losses: any temperature and any Tune trial reuses them, and neither stage 1 nor a trial loads the
reference model. One Lance row per step: the passage keys that the step draws, and their cosines to the query.
N rows of the global batch, P passages of a row, D dimensions.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from tdro_ray.data.collate import Batch, BatchRecipe, Collator
from tdro_ray.data.plan import Plan, fold_numbers
from tdro_ray.data.ray_data import by_actors, quiet

SCHEMA = pa.schema([("step", pa.int64()), ("keys", pa.list_(pa.int64())), ("similarities", pa.list_(pa.float32()))])
COMMIT_STEPS = 64  # steps scored between two commits


def score(
    recipe: BatchRecipe,
    references: Sequence[Path],
    out: Path,
    num_actors: int,
    cpus: float,
    use_gpu: bool,
    batch_tokens: int,
    progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Write the scores of all steps of `recipe.plan` into the Lance dataset `out` and return how many were computed.

    Steps that `out` holds already are kept: a longer plan extends it. The caller makes sure that `out` is of the same
    reference, store and draw (a folder per key); stage 1 compares the keys of every step that it reads all the same.
    Of several references, number j scores the rows of fold j of as many (cross-fitting).
    """
    import lance

    quiet()
    done = _steps_in(out)
    missing = recipe.plan.num_steps - done
    if missing <= 0:
        return 0
    made = _tables(recipe, references, done, missing, num_actors, cpus, use_gpu, batch_tokens)
    pending: list[pa.Table] = []
    for table in made:
        pending.append(table.cast(SCHEMA))
        done += 1
        progress(done)
        if len(pending) == COMMIT_STEPS or done == recipe.plan.num_steps:
            lance.write_dataset(pa.concat_tables(pending), str(out), mode="append" if out.exists() else "create")
            pending.clear()
    return missing


def _tables(
    recipe: BatchRecipe,
    references: Sequence[Path],
    first: int,
    count: int,
    num_actors: int,
    cpus: float,
    use_gpu: bool,
    batch_tokens: int,
) -> Iterator[pa.Table]:
    """Yield the scores of `count` steps from `first` on, in order: by an actor pool, or in this process without actors."""
    made_from = {
        "recipe": recipe,
        "references": [str(folder) for folder in references],
        "first": first,
        "batch_tokens": batch_tokens,
        "use_gpu": use_gpu,
    }
    if num_actors == 0:
        scorer = _Scorer(**made_from)
        for i in range(count):
            yield pa.table(scorer({"id": np.array([i])}))
        return
    steps = ray.data.range(count, override_num_blocks=count)
    yield from by_actors(steps, _Scorer, made_from, num_actors, cpus, use_gpu, "score")


def similarities(batch: Batch, vector_SD: np.ndarray) -> np.ndarray:
    """Return the cosines (N, P) of each row's passages to its query, from the vectors of the batch's S sequences."""
    num_rows, width = batch.passage_key_BP.shape
    query_ND, passage_NPD = vector_SD[:num_rows], vector_SD[num_rows:].reshape(num_rows, width, -1)
    return np.einsum("nd,npd->np", query_ND, passage_NPD).astype(np.float32)


class _Scorer:
    """One actor: a collator and the reference models."""

    def __init__(
        self, recipe: BatchRecipe, references: list[str], first: int, batch_tokens: int, use_gpu: bool
    ) -> None:
        import torch

        from tdro_ray.model.encoder import Encoder

        torch.set_flush_denormal(True)
        self.collator, self.first, self.batch_tokens = Collator(recipe), first, batch_tokens
        device = "cuda" if use_gpu else "cpu"
        self.encoders = [Encoder.load(folder, device) for folder in references]

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        out: dict[str, list[Any]] = {"step": [], "keys": [], "similarities": []}
        for i in rows["id"]:
            batch = self.collator.batch(self.first + int(i), 0, 1)
            found_NP = similarities(batch, self._vectors(batch))
            out["step"].append(batch.step)
            out["keys"].append(batch.passage_key_BP.ravel())
            out["similarities"].append(found_NP.ravel())
        return out

    def _vectors(self, batch: Batch) -> np.ndarray:
        """Return the vectors of the batch's sequences (S, D), each row's by the reference of its fold."""
        sequences = np.split(batch.ids, np.cumsum(batch.length_S)[:-1])
        if len(self.encoders) == 1:
            return self.encoders[0].embed_ids(sequences, self.batch_tokens)
        fold_N = folds_of(self.collator.recipe.plan, batch.task_B, batch.row_B, len(self.encoders))
        fold_S = np.concatenate([fold_N, np.repeat(fold_N, batch.passage_key_BP.shape[1])])
        vector_SD: Any = None
        for number in np.unique(fold_S):
            at = np.flatnonzero(fold_S == number)
            part = self.encoders[number].embed_ids([sequences[i] for i in at], self.batch_tokens)
            vector_SD = np.empty((len(sequences), part.shape[1]), part.dtype) if vector_SD is None else vector_SD
            vector_SD[at] = part
        return vector_SD


def folds_of(plan: Plan, task_N: np.ndarray, row_N: np.ndarray, count: int) -> np.ndarray:
    """Return the fold of each row, out of `count`: the one whose rows its reference has not seen (N,)."""
    return np.array(
        [fold_numbers(plan.sizes[t], plan.seed, int(t), count)[r] for t, r in zip(task_N, row_N, strict=True)]
    )


def _steps_in(out: Path) -> int:
    import lance

    if not out.exists():
        return 0
    try:
        return int(lance.dataset(str(out)).count_rows())
    except (OSError, ValueError):  # killed before the first commit
        shutil.rmtree(out)
        return 0
