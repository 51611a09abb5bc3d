"""The stages of a run in order, what each depends on, and whether it is up to date. Knows no stage's inside.

A stage has a key: a hash of the settings it reads and of the keys of the stages before it. Its manifest,
`stages/<stage>/manifest.json`, is written last; a stage whose manifest holds its present key and whose outputs exist
is skipped. Ray is started by the first stage that is not up to date.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

from tdro_ray.config import Recipe, run_folder
from tdro_ray.errors import ConfigError

FORMAT = 1  # raised when stages of an earlier version must run again


class Progress(Protocol):
    """Shows how far a stage is."""

    def update(self, text: str, share: float | None = None) -> None:
        """Show a short text, and a bar where the done share (0 to 1) is known."""
        ...


class Display(Protocol):
    """What the user sees of a run."""

    def stage(self, name: str) -> AbstractContextManager[Progress]: ...

    def done(self, name: str, line: str, seconds: float) -> None: ...

    def skipped(self, name: str, line: str) -> None: ...


@dataclass(frozen=True)
class Stage:
    """One stage, ready to run: `work(progress)` returns (one line for the user, summary for the manifest)."""

    name: str
    key: str
    outputs: tuple[Path, ...]
    work: Callable[[Progress], tuple[str, dict[str, Any]]]


@dataclass
class Run:
    """A recipe and its run folder."""

    recipe: Recipe
    display: Display
    connect: Callable[[], None] = lambda: None
    folder: Path = field(init=False)
    writes: bool = True  # False: this run is only looked at

    def __post_init__(self) -> None:
        self.folder = run_folder(self.recipe)

    def open(self) -> None:
        """Make the run folder and write the resolved recipe into it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "config.json", self.recipe.model_dump(mode="json"))

    def path(self, stage: str) -> Path:
        return self.folder / "stages" / stage

    def manifest(self, stage: str) -> dict[str, Any]:
        """The manifest of a stage that has run; {} otherwise."""
        return read_json(self.path(stage) / "manifest.json")

    def needs(self, stage: str, key: str) -> dict[str, Any]:
        """The manifest of a stage that must be up to date; raises ConfigError with the command that makes it so."""
        manifest = self.manifest(stage)
        if manifest.get("key") != key:
            state = "has not run" if not manifest else "is out of date (settings or data changed)"
            raise ConfigError(
                f"Stage {stage} {state}. Run `tdro {stage.partition('-')[0]} {self.recipe.name}` or `tdro run {self.recipe.name}` first."
            )
        return manifest

    def is_current(self, stage: Stage) -> bool:
        """Return whether a stage's manifest holds its present key and its outputs exist."""
        return self.manifest(stage.name).get("key") == stage.key and all(p.exists() for p in stage.outputs)

    def do(self, stage: Stage) -> dict[str, Any]:
        """Run a stage unless it is up to date; return its manifest."""
        if self.is_current(stage):
            manifest = self.manifest(stage.name)
            self.display.skipped(stage.name, manifest["line"])
            return manifest
        self.connect()
        folder = self.path(stage.name)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "manifest.json").unlink(missing_ok=True)
        began = time.monotonic()
        with self.display.stage(stage.name) as progress:
            line, summary = stage.work(progress)
        manifest = {
            "stage": stage.name,
            "key": stage.key,
            "seconds": round(time.monotonic() - began, 2),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "line": line,
            "summary": summary,
            "outputs": [
                str(p.relative_to(self.folder)) if p.is_relative_to(self.folder) else str(p) for p in stage.outputs
            ],
        }
        write_json(folder / "manifest.json", manifest)
        self.display.done(stage.name, line, manifest["seconds"])
        return manifest


def key_of(*parts: Any) -> str:
    """Return a short hash of settings, keys and other plain values."""
    return blake2b(json.dumps([FORMAT, *parts], sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object at `path`; {} where there is none or it is damaged (the stage then runs again)."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def write_json(path: Path, value: Any) -> None:
    """Write JSON under a temporary name and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    temporary.replace(path)


def fresh_folder(path: Path) -> Path:
    """Return `path` as an empty folder."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path
