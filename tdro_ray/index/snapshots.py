"""Named copies of an index, and what versions there are.

    <out>/snapshots/<name>/    a version folder with all changes merged; never removed by builds

Files are hard links where the file system has them: a published version's files never change.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tdro_ray.errors import ConfigError, DataError
from tdro_ray.index import versions
from tdro_ray.index.base import RetrievalIndex
from tdro_ray.index.changes import ChangeLog
from tdro_ray.index.merge import write_merged

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def snapshot(out_folder: str | Path, name: str) -> dict[str, Any]:
    """Keep the documents in force now under `name`, which must be new; return the manifest.

    Raises ConfigError for a name that is taken or no file name, BusyError while a build runs.
    """
    out_folder, started = Path(out_folder).resolve(), time.time()
    if not NAME.fullmatch(name):
        raise ConfigError(f"{name!r:.80} is no name for a snapshot: use up to 64 letters, digits, '.', '_' and '-'.")
    root = out_folder / "snapshots"
    if (root / name).exists():
        raise ConfigError(f"Snapshot {name!r} exists in {out_folder}; choose another name, or remove {root / name}.")
    with versions.building(out_folder):
        index = RetrievalIndex.open(out_folder)
        view = index.overlay.view()
        making = root / f".making-{name}"
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        try:
            if view.seq == index.overlay.merged_seq:
                _copy(index.folder, making)
                versions.write_manifest(making, index.manifest | {"merged_seq": view.seq, "snapshot": name})
            else:
                write_merged(index, view, making, {"version": index.version, "snapshot": name}, started)
            versions.flush(making)
            making.rename(root / name)
            versions.sync(root)
        except BaseException:
            shutil.rmtree(making, ignore_errors=True)
            raise
    return versions.manifest(root / name)


def restore(out_folder: str | Path, name: str) -> dict[str, Any]:
    """Publish a snapshot's documents as a new version, and return its manifest.

    What was written after the snapshot is out of view, on purpose, up to the moment of this call; later changes are seen.
    Raises ConfigError for an unknown name, BusyError while a build runs.
    """
    out_folder = Path(out_folder).resolve()
    if name not in snapshot_names(out_folder):
        raise ConfigError(
            f"{out_folder} has no snapshot {name!r:.80}; there are: {', '.join(snapshot_names(out_folder)) or 'none'}."
        )
    with versions.new_version(out_folder) as (version, folder):
        source = out_folder / "snapshots" / name
        _copy(source, folder)
        manifest = versions.manifest(source)
        manifest |= {"version": version, "merged_seq": ChangeLog(out_folder).last_seq(), "restored_from": name}
        manifest |= {"created": datetime.now(UTC).isoformat(timespec="seconds")}
        versions.write_manifest(folder, manifest)
    return manifest


def snapshot_names(out_folder: Path) -> list[str]:
    """Names of the complete snapshots."""
    found = (path.parent.name for path in out_folder.glob("snapshots/*/manifest.json"))
    return sorted(name for name in found if not name.startswith("."))


def listing(out_folder: str | Path) -> list[dict[str, Any]]:
    """Versions, oldest first, then snapshots: the manifest of each, with `name`, `kind` and whether it is current.

    Raises DataError where the folder holds no complete index.
    """
    out_folder = Path(out_folder).resolve()
    now = versions.current(out_folder).name
    rows = [
        {**versions.manifest(out_folder / "versions" / name), "name": name, "kind": "version", "current": name == now}
        for name in versions.names(out_folder)
    ]
    rows += [
        {**versions.manifest(out_folder / "snapshots" / name), "name": name, "kind": "snapshot", "current": False}
        for name in snapshot_names(out_folder)
    ]
    return rows


def _copy(source: Path, target: Path) -> None:
    """Copy a version's files, all but the manifest, which is written last."""
    if not (source / "manifest.json").is_file():
        raise DataError(f"{source} is not a complete version.")
    shutil.copytree(
        source,
        target,
        dirs_exist_ok=True,
        copy_function=_link,
        ignore=lambda folder, names: ["manifest.json"] if Path(folder) == source else [],
    )


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
