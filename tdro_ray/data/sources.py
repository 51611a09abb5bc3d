"""Which tasks a list of sources holds: one file, one task folder, a folder of task folders, each by path or URL, or a hub dataset."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from hashlib import blake2b
from typing import Any

import yaml

from tdro_ray.data.formats import ENDINGS, format_of
from tdro_ray.data.hub import PREFIX, HubDataset
from tdro_ray.data.layouts import corpus_files, test_split
from tdro_ray.data.place import (
    Place,
    RemotePath,
    files_under,
    first_existing,
    place,
    plain_suffix,
    remote_message,
    stamp,
)
from tdro_ray.errors import DataError, nearest
from tdro_ray.types import TaskInfo

NO_TRAINING_ROWS = re.compile(r"(docs|corpus)(-\d+)?|queries|dev|valid|validation|test")  # files that tests are made of

SHORTEST = 4  # tokens that a text may be cut to


@dataclass(frozen=True)
class TaskSource:
    """Where one task's training rows, test and facts come from."""

    name: str
    files: tuple[tuple[Place | HubDataset, str], ...]  # (file or folder, name of its format), read in this order
    test: Place | None  # folder with judgements of a test or dev split
    info: TaskInfo

    def fingerprint(self) -> str:
        """Return a key that changes when a file of the task changes (name, size, time of change or ETag)."""
        paths = [path for path, _ in self.files if not isinstance(path, HubDataset)]
        parts = [path for path in paths if path.is_file()]
        for folder in {path for path in paths if path.is_dir()} | ({self.test} if self.test else set()):
            parts += files_under(folder)
            parts += corpus_files(folder)  # which may lie beside it
        seen: list[Any] = [stamp(path) for path in sorted(set(parts))]
        seen += [path.fingerprint() for path, _ in self.files if isinstance(path, HubDataset)]
        return blake2b(json.dumps([seen, [str(p) for p, _ in self.files]]).encode(), digest_size=16).hexdigest()


def discover(sources: Iterable[str], note: Callable[[str], None] = lambda line: None) -> list[TaskSource]:
    """Return the tasks of all sources, in the order given, folders in name order.

    Raises DataError for a source that is missing or holds no task, and for two tasks of one name.
    """
    tasks: dict[str, TaskSource] = {}
    for source in sources:
        for task in _tasks_of(source, note):
            if task.name in tasks:
                raise DataError(
                    f"Two tasks are called {task.name!r}: {tasks[task.name].files[0][0]} and {task.files[0][0]}. Rename one folder or file."
                )
            tasks[task.name] = task
    return list(tasks.values())


def _tasks_of(source: str, note: Callable[[str], None]) -> list[TaskSource]:
    if source.startswith(PREFIX):
        dataset = HubDataset.parse(source)
        return [TaskSource(_clean(dataset.name), ((dataset, "hf"),), None, TaskInfo(source=source))]
    path = place(source)
    if path.exists():
        return _tasks_at(path, note)
    if isinstance(path, RemotePath):
        raise DataError(remote_message(source, FileNotFoundError("there is no such bucket, folder or file")))
    raise DataError(
        f"Source {source!r} does not exist (looked at {path.absolute()}). data.sources takes 'environment', task folders, "
        f"training files, folders of task folders, URLs of these (s3://bucket/folder), or a hub dataset (hf:org/name)."
    )


def _tasks_at(path: Place, note: Callable[[str], None]) -> list[TaskSource]:
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
            f"BEIR, MIRACL or Mr.TyDi folder with train judgements; a source may also be a folder of such folders. A test alone goes to evaluate.extra_tests."
        )
    return found


def _task_folder(folder: Place) -> TaskSource | None:
    files = _training_files(folder)
    if not files:
        return None
    test = next((p for p in (folder, folder / "test") if test_split(p)), None)
    return TaskSource(_clean(folder.resolve().name), files, test, _info(folder))


def _training_files(folder: Place) -> tuple[tuple[Place, str], ...]:
    """`train.jsonl` or `train.parquet` where there is one, else all such files, else the folder with its judgements."""
    for name in ("train.jsonl", "train.parquet"):
        if path := first_existing(folder, name):
            return ((path, str(format_of(path))),)
    endings = (".jsonl", ".ndjson", ".parquet")
    lines = [p for p in sorted(folder.iterdir()) if p.is_file() and plain_suffix(p) in endings]
    lines = [p for p in lines if not NO_TRAINING_ROWS.fullmatch(p.name.split(".")[0])]
    if lines:
        return tuple((p, str(format_of(p))) for p in lines)
    name = format_of(folder)
    return ((folder, name),) if name else ()


def _info(folder: Place) -> TaskInfo:
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
    kinds: dict[str, tuple[type, ...]] = {
        "str": (str,),
        "bool": (bool,),
        "float | None": (int, float, type(None)),
        "int | None": (int, type(None)),
    }
    for key, value in changes.items():
        if key not in valid:
            raise DataError(f"{at}: unknown field {key!r}.{nearest(str(key), valid)}")
        if not isinstance(value, kinds[valid[key]]) or (isinstance(value, bool) and valid[key] != "bool"):
            raise DataError(f"{at}: field {key!r} must be {valid[key]}, got {value!r:.80}.")
        if key in ("query_length", "passage_length") and value is not None and value < SHORTEST:
            raise DataError(f"{at}: field {key!r} must be at least {SHORTEST} tokens, got {value}.")
    return replace(info, **changes)


def _name_of(path: Place) -> str:
    stem = path.name.split(".")[0]
    return _clean(path.resolve().parent.name if stem in ("train", "data") else stem)


def _clean(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip(".") or "task"
