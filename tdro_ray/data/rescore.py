"""What mining found, scored by a cross-encoder: an actor pool reads each query together with its passages.

Margins against false negatives and distillation then use these scores. Q queries of a task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from tdro_ray.config import MineSettings, RescoreSettings, ScaleSettings, least_workers
from tdro_ray.data.collection import Collection
from tdro_ray.data.dense import DenseHits, within_margins
from tdro_ray.data.ray_data import by_actors, quiet

BLOCK_ROWS = 64  # rows scored at a time, with up to `last_rank` passages each


@dataclass(frozen=True)
class Rescored:
    """Scores of a task's rows, and what the margins left of what was found."""

    hits: DenseHits
    scores: list[dict[int, float]]  # of each row: passage -> score, for its positives, given negatives and hits


def rescore(
    folder: Path,
    records: Sequence[Mapping[str, Any]],
    found: Sequence[np.ndarray],
    settings: MineSettings,
    scale: ScaleSettings,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Rescored:
    """Score every row's positives, given negatives and what was found for it, and filter the latter by the margins.

    `records` has all rows of the task in order, `found` the passages of each, best first. They stay in that order.
    """
    from tdro_ray.model.cross_encoder import check

    assert settings.rescore is not None
    check(settings.rescore.model)  # here: an actor's error would come with Ray's own stack traces
    wanted = []
    for record, hits in zip(records, found, strict=True):
        known = [*record["positives"], *record["given_negatives"]]
        wanted.append(list(dict.fromkeys([*known, *hits.tolist()])))
    scores: list[dict[int, float]] = []
    for table in _scored(folder, wanted, settings.rescore, scale):
        for passages, values in zip(table["passages"].to_pylist(), table["scores"].to_pylist(), strict=True):
            scores += [dict(zip(p, v, strict=True)) for p, v in zip(passages, values, strict=True)]
        progress(len(scores), len(records))
    assert len(scores) == len(records)
    return Rescored(_within(records, found, scores, settings), scores)


def _within(
    records: Sequence[Mapping[str, Any]],
    found: Sequence[np.ndarray],
    scores: Sequence[Mapping[int, float]],
    settings: MineSettings,
) -> DenseHits:
    """Filter by the margins, against each row's positive of the lowest score."""
    passages, kept, lowest, filtered, ranked = [], [], [], [], 0
    for record, hits, score in zip(records, found, scores, strict=True):
        lowest.append(min(score[p] for p in record["positives"]))
        others = hits[~np.isin(hits, record["positives"])]
        score_X = np.array([score[p] for p in others.tolist()], np.float32)
        keep = within_margins(score_X, lowest[-1], settings.margin_absolute, settings.margin_relative)
        passages.append(others[keep])
        kept.append(score_X[keep])
        filtered.append(others[~keep])
        ranked += len(others)
    return DenseHits(passages, kept, np.array(lowest, np.float32), ranked, filtered)


def _scored(
    folder: Path, wanted: Sequence[list[int]], settings: RescoreSettings, scale: ScaleSettings
) -> Iterator[pa.Table]:
    """Yield the scores of all rows, BLOCK_ROWS at a time: by an actor pool, or in this process without actors."""
    blocks = [{"start": at, "passages": list(wanted[at : at + BLOCK_ROWS])} for at in range(0, len(wanted), BLOCK_ROWS)]
    made_from = {"folder": str(folder), "settings": settings, "use_gpu": scale.use_gpu}
    actors = least_workers(scale)
    if actors == 0:
        scorer = _Scorer(**made_from)
        for block in blocks:
            yield scorer({key: [value] for key, value in block.items()})
        return
    quiet()
    dataset = ray.data.from_items(blocks, override_num_blocks=len(blocks))
    yield from by_actors(
        dataset, _Scorer, made_from, actors, scale.cpus_per_worker, scale.use_gpu, f"rescore:{folder.name}"
    )


class _Scorer:
    """One actor: a cross-encoder and the task's texts."""

    def __init__(self, folder: str, settings: RescoreSettings, use_gpu: bool) -> None:
        import torch

        from tdro_ray.model.cross_encoder import CrossEncoder

        torch.set_flush_denormal(True)
        self.collection, self.settings = Collection(Path(folder)), settings
        device = "cuda" if use_gpu else "cpu"
        self.model = CrossEncoder.load(settings.model, settings.length, settings.sigmoid, device)

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> pa.Table:
        out: dict[str, list[Any]] = {"passages": [], "scores": []}
        for start, rows in zip(batch["start"], batch["passages"], strict=True):
            passages = [[int(p) for p in row] for row in rows]
            numbers = range(int(start), int(start) + len(passages))
            queries = self.collection.take_rows(numbers, ["query"])["query"].to_pylist()
            texts = self.collection.take_texts([p for row in passages for p in row])
            asked = [query for query, row in zip(queries, passages, strict=True) for _ in row]
            score_N = self.model.score(asked, texts, self.settings.batch_tokens)
            ends = np.cumsum([len(row) for row in passages])[:-1]
            out["passages"].append(passages)
            out["scores"].append([part.tolist() for part in np.split(score_N, ends)])
        return pa.table(out)
