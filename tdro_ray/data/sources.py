"""Which tasks a list of source paths holds: one file, one task folder, or a folder of task folders."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import yaml

from tdro_ray.data.formats import ENDINGS, first_existing, format_of, plain_suffix
from tdro_ray.errors import DataError, nearest
from tdro_ray.types import TaskInfo

BEIR_FILES = ("corpus", "queries")


@dataclass(frozen=True)
class TaskSource:
    """Where one task's training rows, test and facts come from."""

    name: str
    files: tuple[tuple[Path, str], ...]  # (file or BEIR folder, name of its format), read in this order
    test: Path | None  # BEIR folder with qrels/test.tsv
    info: TaskInfo

    def fingerprint(self) -> str:
        """Return a key that changes when a file of the task changes (name, size or time of change)."""
        parts = [path for path, _ in self.files if path.is_file()]
        for folder in {path for path, _ in self.files if path.is_dir()} | ({self.test} if self.test else set()):
            parts += [p for p in folder.rglob("*") if p.is_file()]
        seen = [(str(p), s.st_size, s.st_mtime_ns) for p in sorted(set(parts)) for s in [p.stat()]]
        return blake2b(json.dumps([seen, [str(p) for p, _ in self.files]]).encode(), digest_size=16).hexdigest()


def discover(sources: Iterable[str], note: Callable[[str], None] = lambda line: None) -> list[TaskSource]:
    """Return the tasks of all source paths, in the order given, folders in name order.

    Raises DataError for a path that is missing or holds no task, and for two tasks of one name.
    """
    tasks: dict[str, TaskSource] = {}
    for source in sources:
        path = Path(source).expanduser()
        if not path.exists():
            raise DataError(
                f"Source {source!r} does not exist (looked at {path.absolute()}). data.sources takes 'environment', "
                f"task folders, training files, or folders of task folders."
            )
        for task in _tasks_at(path, note):
            if task.name in tasks:
                raise DataError(
                    f"Two tasks are called {task.name!r}: {tasks[task.name].files[0][0]} and {task.files[0][0]}. Rename one folder or file."
                )
            tasks[task.name] = task
    return list(tasks.values())


def _tasks_at(path: Path, note: Callable[[str], None]) -> list[TaskSource]:
    if path.is_file():
        name = format_of(path)
        if name is None:
            raise DataError(
                f"{path} is in no known format. Valid endings: {', '.join(sorted(ENDINGS))} (also with .gz or .zst)."
            )
        return [TaskSource(_name_of(path), ((path, name),), None, TaskInfo(source=str(path)))]
    if task := _task_folder(path):
        return [task]
    folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    found = []
    for folder in folders:
        if task := _task_folder(folder):
            found.append(task)
        else:
            note(f"{folder} holds no training rows and is left out")
    if not found:
        raise DataError(
            f"{path} holds no task. A task folder has train.jsonl (or other .jsonl or .parquet files, also .gz or .zst), or a "
            f"BEIR corpus with qrels/train.tsv; a source may also be a folder of such folders. A test alone goes to evaluate.extra_tests."
        )
    return found


def _task_folder(folder: Path) -> TaskSource | None:
    files = _training_files(folder)
    if not files:
        return None
    test = next((p for p in (folder, folder / "test") if (p / "qrels" / "test.tsv").is_file()), None)
    return TaskSource(_clean(folder.resolve().name), files, test, _info(folder))


def _training_files(folder: Path) -> tuple[tuple[Path, str], ...]:
    """`train.jsonl` or `train.parquet` where there is one, else all such files, else the BEIR folder itself."""
    for name in ("train.jsonl", "train.parquet"):
        if path := first_existing(folder, name):
            return ((path, str(format_of(path))),)
    lines = [
        p for p in sorted(folder.iterdir()) if p.is_file() and plain_suffix(p) in (".jsonl", ".ndjson", ".parquet")
    ]
    lines = [p for p in lines if p.name.split(".")[0] not in BEIR_FILES]
    if lines:
        return tuple((p, str(format_of(p))) for p in lines)
    return ((folder, "beir"),) if format_of(folder) == "beir" else ()


def _info(folder: Path) -> TaskInfo:
    """Facts of `task.yaml` where the folder has one."""
    path = folder / "task.yaml"
    if not path.is_file():
        return TaskInfo(source=str(folder))
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as err:
        raise DataError(f"{path} is not valid YAML: {err}") from err
    if not isinstance(raw, dict):
        raise DataError(f"{path} must hold a mapping, it holds {type(raw).__name__}.")
    return merge_info(TaskInfo(source=str(folder)), raw, str(path))


def merge_info(info: TaskInfo, changes: dict[str, Any], at: str) -> TaskInfo:
    """Return `info` with the given fields changed; raises DataError (naming `at`) for an unknown field or a wrong type."""
    valid = {f.name: str(f.type) for f in fields(TaskInfo)}
    kinds: dict[str, tuple[type, ...]] = {"str": (str,), "bool": (bool,), "float | None": (int, float, type(None))}
    for key, value in changes.items():
        if key not in valid:
            raise DataError(f"{at}: unknown field {key!r}.{nearest(str(key), valid)}")
        if not isinstance(value, kinds[valid[key]]):
            raise DataError(f"{at}: field {key!r} must be {valid[key]}, got {value!r:.80}.")
    return replace(info, **changes)


def _name_of(path: Path) -> str:
    stem = path.name.split(".")[0]
    return _clean(path.resolve().parent.name if stem in ("train", "data") else stem)


def _clean(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip(".") or "task"
