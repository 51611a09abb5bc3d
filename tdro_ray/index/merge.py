"""Merge: a new version made of the current one and the changes since, without embedding anything again.

Changes that arrive meanwhile stay in the log: the new version says up to which it has merged. Nothing is published
before it is complete and on the disk, so a merge that fails or is killed leaves everything as it was.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tdro_ray.errors import DataError
from tdro_ray.index import store, versions
from tdro_ray.index.base import RetrievalIndex
from tdro_ray.index.build import Progress, complete
from tdro_ray.index.changes import ChangeLog
from tdro_ray.index.overlay import View


def merge(out_folder: str | Path, progress: Progress | None = None) -> dict[str, Any] | None:
    """Publish a version that holds the current one's documents and all changes; return its manifest, None without changes.

    The factory is chosen by the rule that the index was built by ("auto" by the new size), and the recall is measured
    again against its floor. Raises BusyError while another build runs, DataError (recall, no document left),
    ConfigError (a factory that no longer fits the number of documents).
    """
    out_folder, started = Path(out_folder).resolve(), time.time()
    index = RetrievalIndex.open(out_folder)
    if index.overlay.view().seq == index.overlay.merged_seq:
        return None
    with versions.new_version(out_folder, base=index.version) as (name, folder):
        write_merged(index, index.overlay.view(), folder, {"version": name}, started, progress)
        made = versions.manifest(folder)
    with contextlib.suppress(versions.BusyError):  # the next merge prunes
        prune(out_folder)
    return made


def prune(out_folder: Path) -> None:
    """Remove the changes that every kept version has merged."""
    with versions.building(out_folder):  # no version comes or goes
        kept = [versions.manifest(out_folder / "versions" / name) for name in versions.names(out_folder)]
        ChangeLog(out_folder).prune(min(manifest.get("merged_seq", 0) for manifest in kept))


def write_merged(
    index: RetrievalIndex,
    view: View,
    folder: Path,
    record: dict[str, Any],
    started: float,
    progress: Progress | None = None,
) -> None:
    """Write a complete version of the documents that `view` of `index` shows into the empty `folder`."""
    count = len(index.store) - len(view.hidden) + view.documents
    if index.overlay.foreign:
        raise DataError(
            f"{len(index.overlay.foreign)} documents were written by a server of another model than the index's. A running server "
            "of the index's model embeds them within seconds; then merge again."
        )
    if not count:
        raise DataError(
            f"All documents of {index.folder} are deleted; an index needs at least one. Add documents first."
        )
    fields = {name: kind for name, kind in index.store.fields.items() if name != "id"}
    _, fields = store.write_documents(folder / "documents.lance", _documents(index, view), fields)
    vectors = np.lib.format.open_memmap(folder / "vectors.npy", "w+", np.float32, (count, index.dim))
    at = 0
    for block in _vectors(index, view):
        vectors[at : at + len(block)] = block
        at += len(block)
    old = index.manifest
    rules = old.get("rules") or {"factory": old["factory"], "target_recall": 0.98, "min_recall": 0.0}
    record = {**record, "model": old.get("model", {}), "merged_seq": view.seq, "merged_from": index.version}
    complete(folder, record, vectors, fields, rules, started, progress)


def _documents(index: RetrievalIndex, view: View) -> Iterator[store.Document]:
    hidden = set(view.hidden.tolist())
    base = (document for row, document in enumerate(index.store.documents()) if row not in hidden)
    overlay = (view.document(place) for place in np.flatnonzero(view.live).tolist())
    return itertools.chain(base, ((d["id"], d["title"], d["text"], d["metadata"]) for d in overlay))


def _vectors(index: RetrievalIndex, view: View) -> Iterator[np.ndarray]:
    start = 0
    for block in index.store.vector_blocks():
        keep = np.ones(len(block), bool)
        inside = view.hidden[(view.hidden >= start) & (view.hidden < start + len(block))]
        keep[inside - start] = False
        start += len(block)
        yield block[keep]
    yield view.vectors[view.live]
