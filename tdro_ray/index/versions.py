"""Versions of an index on disk. A version is complete or does not exist; one small file says which is current.

    <out>/current              name of the current version, replaced atomically
    <out>/versions/<n>/        documents.lance, documents.arrow, index.faiss, manifest.json (written last)
    <out>/versions/.building-<n>   a build under way; a killed one is removed by the next
    <out>/.lock                held while a build runs
    <out>/.publish.lock        held for the moment in which another version becomes current
    <out>/changes.lance        what was written since the versions were built (see `changes`)

A reader that has opened a version keeps it: the version before the current one is not removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tdro_ray.errors import CheckpointError, ConfigError, DataError, ResourceError

MODEL_FILES = ("*.safetensors", "*.bin", "config.json", "adapter_config.json", "tdro.json", "tokenizer.json", "*.onnx*")
KEEP = 2  # complete versions left on disk, the current one included


class BusyError(ResourceError):
    """Another build into the folder is under way, or has come in between."""


def names(out_folder: str | Path) -> list[str]:
    """Names of the complete versions, oldest first."""
    found = (path.parent.name for path in Path(out_folder).glob("versions/*/manifest.json"))
    return sorted((name for name in found if name.isdigit()), key=int)


def current(out_folder: str | Path) -> Path:
    """Return the folder of the current version. Raises DataError where no index is complete."""
    out_folder, before = Path(out_folder), ""
    while True:
        try:
            name = (out_folder / "current").read_text(encoding="utf-8").strip()
        except OSError as err:
            raise DataError(f"{out_folder} holds no complete index. Build one with `tdro index`.") from err
        folder = out_folder / "versions" / name
        if name.isdigit() and (folder / "manifest.json").is_file():
            return folder
        if name == before:
            complete = ", ".join(names(out_folder)) or "none"
            raise DataError(f"{out_folder / 'current'} names version {name!r:.40}; complete are: {complete}.")
        before = name  # it may have been replaced and removed since it was read


def manifest(version_folder: Path) -> dict[str, Any]:
    """Return the manifest of a complete version."""
    try:
        return json.loads((version_folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise DataError(
            f"{version_folder / 'manifest.json'} cannot be read: {err}. Build the index again with `tdro index`."
        ) from err


def select(out_folder: str | Path, name: str) -> None:
    """Make a complete version the current one: the way back to an older version, at once, even while a build runs.

    Changes that the version has not merged stay in view: it answers with them, as it did when it was current.
    """
    out_folder = Path(out_folder)
    with _lock(out_folder, ".publish.lock", wait=True):
        if name not in names(out_folder):
            raise DataError(
                f"{out_folder} has no version {name!r:.40}; complete are: {', '.join(names(out_folder)) or 'none'}."
            )
        _replace(out_folder / "current", name + "\n")


@contextlib.contextmanager
def new_version(out_folder: str | Path, base: str = "") -> Iterator[tuple[str, Path]]:
    """Yield the name and the empty folder of a new version; on leaving it, publish it and make it current.

    The caller writes `manifest.json` last. An error inside leaves the current version as it was. `base` is the version
    that the new one is made of: it is published only while that one is still current.
    Raises BusyError while another build into the same folder runs, or where `base` is no longer current.
    """
    out_folder = Path(out_folder)
    root = out_folder / "versions"
    root.mkdir(parents=True, exist_ok=True)
    with building(out_folder):
        _check_base(out_folder, base)
        for stale in (*root.glob(".building-*"), *root.glob(".removed-*")):
            shutil.rmtree(stale)
        name = str(max((int(n) for n in os.listdir(root) if n.isdigit()), default=0) + 1)  # noqa: PTH208
        folder = root / f".building-{name}"
        folder.mkdir()
        try:
            yield name, folder
            assert (folder / "manifest.json").is_file(), "a version is published with its manifest"
            flush(folder)
            _publish(out_folder, folder, name, base)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _publish(out_folder: Path, folder: Path, name: str, base: str) -> None:
    root = folder.parent
    with _lock(out_folder, ".publish.lock", wait=True):
        before = _check_base(out_folder, base)
        folder.rename(root / name)
        sync(root)
        _replace(out_folder / "current", name + "\n")
        for old in names(out_folder)[:-KEEP]:
            if old != before:
                gone = (root / old).rename(root / f".removed-{old}")  # at once: a reader finds all of it or nothing
                shutil.rmtree(gone)


def _check_base(out_folder: Path, base: str) -> str:
    """Return the name of the current version, "" where there is none."""
    name = current(out_folder).name if (out_folder / "current").exists() else ""
    if base and name != base:
        raise BusyError(
            f"Version {name} of {out_folder} became current while version {base} was worked on; do it again."
        )
    return name


def flush(folder: Path) -> None:
    """Bring all files of a folder to the disk: what replaces acknowledged changes must be as durable as they are."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Bring one file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def model_hash(folder: str | Path) -> str:
    """SHA-256 over what an encoder reads from a model folder: equal hashes make comparable vectors.

    Other files (a model card, results) may come and go. An ONNX export names the hash of the model that it was made of
    and compared with: it serves that model's index. Raises CheckpointError for a folder without weights.
    """
    folder = Path(folder)
    if source := _source_hash(folder):
        return source
    files = sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern)})
    if not any(path.suffix in (".safetensors", ".bin", ".onnx") for path in files):
        raise CheckpointError(f"{folder} is not a model folder: it holds no weights (*.safetensors).")
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _source_hash(folder: Path) -> str:
    try:
        return str(json.loads((folder / "onnx.json").read_text(encoding="utf-8"))["source_hash"])
    except (OSError, ValueError, KeyError):
        return ""


def check_same_model(manifest: dict[str, Any], name: str, model_hash: str) -> None:
    """Raise ConfigError when an index was built with another model: its vectors and the model's do not compare."""
    built = manifest.get("model", {})
    if model_hash and built.get("hash") and built["hash"] != model_hash:
        raise ConfigError(
            f"Index version {manifest.get('version')} was built with model {built.get('name')!r} (hash {built['hash'][:12]}); the "
            f"served model {name!r} is another (hash {model_hash[:12]}). Serve that model, or build the index again."
        )


def write_manifest(version_folder: Path, record: dict[str, Any]) -> None:
    """Write the manifest of a version, atomically."""
    _replace(version_folder / "manifest.json", json.dumps(record, indent=2, sort_keys=True) + "\n")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


@contextlib.contextmanager
def building(out_folder: Path) -> Iterator[None]:
    """Hold the right to build in a folder. Raises BusyError while another has it."""
    with _lock(out_folder, ".lock", wait=False):
        yield


@contextlib.contextmanager
def _lock(out_folder: Path, name: str, wait: bool) -> Iterator[None]:
    """Hold a lock file of a folder; the system lets go of it when the process dies."""
    with (out_folder / name).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as err:
            raise BusyError(f"Another build writes into {out_folder}; wait for it, or choose another folder.") from err
        yield
