"""How tasks appear in the collection store: one writer at a time, whole tasks only, manifests last."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tdro_ray.data.collection import TaskManifest
from tdro_ray.errors import DataError

REPLACED = ".tmp-old-"  # a task that is being replaced waits under this name


def write_manifest(folder: Path, manifest: TaskManifest) -> None:
    """Write `manifest.json` whole or not at all."""
    temporary = folder / f".manifest-{os.getpid()}.json"
    temporary.write_text(json.dumps(manifest.dump(), indent=1, ensure_ascii=False), encoding="utf-8")
    temporary.replace(folder / "manifest.json")


def publish(store: Path, folder: Path, manifest: TaskManifest) -> TaskManifest:
    """Move a written task into the store. A task whose content is the same stays, cleaned and with its mined negatives."""
    place = store / manifest.name
    old = read_manifest(store, manifest.name)
    if old is not None and (old.ingested_hash, old.tests_hash) == (manifest.hash, manifest.tests_hash):
        manifest = replace(manifest, rows=old.rows, hash=old.hash, clean=old.clean, negatives=old.negatives)
        write_manifest(place, manifest)
        shutil.rmtree(folder)
    else:
        write_manifest(folder, manifest)
        aside = store / f"{REPLACED}{manifest.name}"
        if place.exists():
            place.rename(aside)
        folder.rename(place)
        shutil.rmtree(aside, ignore_errors=True)
    (store / f"{manifest.name}.rejects.jsonl").unlink(missing_ok=True)  # of an ingest that failed
    return manifest


def read_manifest(store: Path, name: str) -> TaskManifest | None:
    """Return the manifest of a task in the store, or None where there is none that this version can read."""
    try:
        return TaskManifest.parse(json.loads((store / name / "manifest.json").read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None


@contextmanager
def store_lock(store: Path) -> Iterator[None]:
    """Hold the store for writing; clears what killed writers left. Raises DataError while another writer holds it."""
    store.mkdir(parents=True, exist_ok=True)
    with (store / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise DataError(
                f"The collection store {store} is being written by process {holder}. Wait until it is done, or set another data.store."
            ) from err
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        _clear(store)
        yield


def _clear(store: Path) -> None:
    """Remove what a killed writer left; a task that it had put aside and not yet replaced goes back."""
    for aside in store.glob(f"{REPLACED}*"):
        place = store / aside.name.removeprefix(REPLACED)
        if not place.exists():
            aside.rename(place)
    for left in store.glob(".tmp-*"):
        shutil.rmtree(left, ignore_errors=True)
