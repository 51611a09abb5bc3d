"""A model folder that may be replaced while it is served. Knows files and how to load them, nothing of requests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tdro_ray.index import versions

Files = tuple[tuple[str, int, int], ...]  # name, bytes, time of change in ns


class ModelFolder:
    """The folder's files as they were loaded, and whether others have taken their place."""

    def __init__(self, folder: Path, load: Callable[[], Any]) -> None:
        self.folder, self.load = folder, load
        self.loaded = self._last = self.files()
        self._hashes: dict[Files, str] = {self.loaded: versions.model_hash(folder)}

    def files(self) -> Files:
        """Return what tells a changed folder from the same one without reading it."""
        paths = sorted({path for pattern in versions.MODEL_FILES for path in self.folder.glob(pattern)})
        return tuple((path.name, stat.st_size, stat.st_mtime_ns) for path in paths if (stat := path.stat()))

    def changed(self) -> bool:
        """True when the files are others than those loaded, and the same as at the last look: whole, not half copied."""
        try:
            now = self.files()
        except OSError:  # on its way to another name
            return False
        settled, self._last = now == self._last, now
        return settled and bool(now) and now != self.loaded

    def hash(self) -> str:
        """Return the hash of the files as last looked at; of the same files, the weights are read once."""
        if self._last not in self._hashes:
            self._hashes = {self._last: versions.model_hash(self.folder)}
        return self._hashes[self._last]

    def take(self) -> None:
        """Count the files as last looked at as loaded."""
        self.loaded = self._last
