"""From plan rows to one worker's batch: fetch from the collection store, tokenise, flatten. No Ray, no torch.

B rows of one worker, P passages of a row (the positive first), K positives of a row (padded with -1),
S = B * (1 + P) sequences: all queries first, then the passages row by row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tdro_ray.data.plan import Plan, draw_negatives, shares
from tdro_ray.errors import DataError
from tdro_ray.model.tokenize import TextTokenizer

if TYPE_CHECKING:
    from tdro_ray.data.collection import Collection


@dataclass(frozen=True)
class Batch:
    """One worker's share of one step; token ids are flattened, so no padding travels."""

    step: int
    rank: int
    task_B: np.ndarray  # int64 task of each row
    row_B: np.ndarray  # int64 row within its task
    passage_key_BP: np.ndarray  # int64, equal for equal passages of one task; -1 where a row has no such passage
    positive_key_BK: np.ndarray  # int64 keys of all positives of a row
    ids: np.ndarray  # int32 token ids of the S sequences, one after another
    length_S: np.ndarray  # int64
    reference_BP: np.ndarray | None = None  # float32 reference similarities (stage 1)
    probe: Batch | None = None  # stage 1 on rows apart: what the signal is measured on, and nothing is trained on
    teacher_BP: np.ndarray | None = None  # float32 scores of a teacher, NaN where there is none (distillation)

    @property
    def offset_S(self) -> np.ndarray:
        """Start of each sequence in `ids`."""
        return np.cumsum(self.length_S) - self.length_S


@dataclass(frozen=True)
class BatchRecipe:
    """Everything that turns (step, rank, number of workers) into a Batch; small, so that it travels with every task."""

    store: Path
    names: tuple[str, ...]  # tasks in the plan's order
    versions: tuple[int, ...]  # Lance version of each task's rows
    model: Path  # folder whose tokenizer and tdro.json are used
    plan: Plan
    num_negatives: int
    scores: Path | None = None  # Lance dataset of reference similarities, one row per step
    probe: Plan | None = None  # rows that stage 1 measures its signal on; None: the plan's own
    teacher: bool = False  # batches carry the teacher's scores


class Collator:
    """Opens what a BatchRecipe names, once per process, and makes batches."""

    def __init__(self, recipe: BatchRecipe) -> None:
        from tdro_ray.data.collection import CollectionStore  # here: the loop needs a Batch, and not Arrow

        self.recipe = recipe
        self.tokenizer = TextTokenizer(recipe.model)
        store = CollectionStore(recipe.store)
        self.collections = [
            store[name].at_version(version) for name, version in zip(recipe.names, recipe.versions, strict=True)
        ]
        self._scores: Any = None

    def batch(self, step: int, rank: int, num_workers: int) -> Batch:
        """Return the share of worker `rank` in step `step`."""
        recipe = self.recipe
        if recipe.probe is None:
            return self._make(recipe.plan, step, rank, num_workers, with_scores=True)
        probe = self._make(recipe.probe, step, rank, num_workers, with_scores=True)
        return replace(self._make(recipe.plan, step, rank, num_workers, with_scores=False), probe=probe)

    def _make(self, plan: Plan, step: int, rank: int, num_workers: int, with_scores: bool) -> Batch:
        negatives = self.recipe.num_negatives
        task_N, row_N = plan.rows(step)
        part = shares(len(task_N), num_workers)[rank]
        task_B, row_B = task_N[part], row_N[part]
        queries, positives, available = self._fetch_rows(task_B, row_B)
        drawn_BK = draw_negatives([len(a) for a in available], negatives, plan.seed, step, part, len(task_N))
        key_BP = np.full((len(task_B), 1 + negatives), -1, np.int64)
        for i, (own, have) in enumerate(zip(positives, available, strict=True)):
            key_BP[i, 0] = own[0]
            key_BP[i, 1:] = [have[d] if d >= 0 else -1 for d in drawn_BK[i]]
        texts = self._fetch_passages(task_B, key_BP)
        sequences = self._tokenize(task_B, queries, texts)
        most = max((len(p) for p in positives), default=1)
        return Batch(
            step=step,
            rank=rank,
            task_B=task_B,
            row_B=row_B,
            passage_key_BP=key_BP,
            positive_key_BK=np.array([[*p, *[-1] * (most - len(p))] for p in positives], np.int64).reshape(
                len(positives), most
            ),
            ids=np.concatenate([np.asarray(s, np.int32) for s in sequences]) if sequences else np.zeros(0, np.int32),
            length_S=np.array([len(s) for s in sequences], np.int64),
            reference_BP=self._reference(plan, step, part, key_BP) if with_scores else None,
            teacher_BP=self._teacher(task_B, row_B, key_BP) if self.recipe.teacher else None,
        )

    def _fetch_rows(self, task_B: np.ndarray, row_B: np.ndarray) -> tuple[list[str], list[list[int]], list[list[int]]]:
        queries: list[Any] = [None] * len(task_B)
        positives: list[Any] = [None] * len(task_B)
        negatives: list[Any] = [None] * len(task_B)
        for task in np.unique(task_B):
            at = np.flatnonzero(task_B == task)
            collection = self.collections[task]
            columns = ["query", "positives"] + (["negatives"] if self.recipe.num_negatives else [])
            table = collection.take_rows(row_B[at].tolist(), columns)
            taken = [table[c].to_pylist() for c in columns]
            for j, i in enumerate(at):
                queries[i], positives[i] = taken[0][j], taken[1][j]
                negatives[i] = (taken[2][j] or []) if self.recipe.num_negatives else []
        return queries, positives, negatives

    def _fetch_passages(self, task_B: np.ndarray, key_BP: np.ndarray) -> list[list[str]]:
        texts: list[list[str]] = [[""] * key_BP.shape[1] for _ in task_B]
        for task in np.unique(task_B):
            at = np.flatnonzero(task_B == task)
            keys = key_BP[at].ravel()
            found = iter(self.collections[task].take_texts(keys[keys >= 0].tolist()))
            for i in at:
                texts[i] = [next(found) if key >= 0 else "" for key in key_BP[i]]
        return texts

    def _tokenize(self, task_B: np.ndarray, queries: list[str], texts: list[list[str]]) -> list[list[int]]:
        num_passages = len(texts[0]) if texts else 0
        query_ids: list[Any] = [None] * len(queries)
        passage_ids: list[Any] = [None] * (len(queries) * num_passages)
        for task in np.unique(task_B):  # one call per task: prompts differ
            at, name = np.flatnonzero(task_B == task), self.recipe.names[task]
            for i, ids in zip(at, self.tokenizer.encode([queries[i] for i in at], "query", name), strict=True):
                query_ids[i] = ids
            flat = self.tokenizer.encode([t for i in at for t in texts[i]], "passage", name)
            for j, i in enumerate(at):
                passage_ids[i * num_passages : (i + 1) * num_passages] = flat[j * num_passages : (j + 1) * num_passages]
        return query_ids + passage_ids

    def _teacher(self, task_B: np.ndarray, row_B: np.ndarray, key_BP: np.ndarray) -> np.ndarray:
        """Return the teacher's scores of the drawn passages (B, P), NaN where there are none: those of mining's cross-encoder
        where it has scored the task, else those that the source gave."""
        from tdro_ray.data.collection import RESCORED

        teacher_BP = np.full(key_BP.shape, np.nan, np.float32)
        for task in np.unique(task_B):
            collection = self.collections[task]
            has = collection.rows.schema.names
            scores, negatives = (RESCORED, "negatives") if RESCORED in has else ("scores", "given_negatives")
            if scores not in has:  # written before there were any
                continue
            at = np.flatnonzero(task_B == task)
            table = collection.take_rows(row_B[at].tolist(), ["positives", negatives, scores])
            for i, row in zip(at, table.to_pylist(), strict=True):
                numbers = [*row["positives"], *row[negatives]]
                found = dict(zip(numbers, row[scores], strict=True)) if row[scores] else {}
                teacher_BP[i] = [found.get(key) for key in key_BP[i].tolist()]  # None becomes NaN
        return teacher_BP

    def _reference(self, plan: Plan, step: int, part: slice, key_BP: np.ndarray) -> np.ndarray | None:
        if self.recipe.scores is None:
            return None
        if self._scores is None:
            import lance

            self._scores = lance.dataset(str(self.recipe.scores))
        record = self._scores.take([step], columns=["keys", "similarities"]).to_pylist()[0]
        width = key_BP.shape[1]
        own = slice(part.start * width, part.stop * width)
        drawn = np.array(record["keys"], np.int64)
        if len(drawn) != plan.batch_size * width or not np.array_equal(drawn[own], key_BP.ravel()):
            raise DataError(
                f"The reference scores in {self.recipe.scores} are not of this plan (step {step} differs). Run `tdro score` again."
            )
        return np.array(record["similarities"], np.float32)[own].reshape(-1, width)


def versions_of(collections: list[Collection]) -> tuple[int, ...]:
    """Return the Lance version of each task's rows, so that a plan reads what it was made for."""
    return tuple(int(c.rows.version) for c in collections)
