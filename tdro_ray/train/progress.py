"""Show a training run's progress while it runs: a thread reads what the workers write."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

INTERVAL = 0.5  # seconds between looks


@contextmanager
def watched(metrics: Path, steps: int, progress: Any) -> Iterator[None]:
    """While the block runs, show the newest line of `metrics` on `progress`."""
    stop = threading.Event()
    progress.update("starting the workers")

    def watch() -> None:
        while not stop.wait(INTERVAL):
            record = _newest(metrics)
            if record:
                progress.update(
                    f"step {record['step']} of {steps}, loss {record['loss']:.3f}, {record['tokens_per_s']:,.0f} tokens/s",
                    record["step"] / steps,
                )

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _newest(path: Path) -> dict[str, Any] | None:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return dict(json.loads(lines[-1])) if lines else None
    except (OSError, ValueError):  # not there yet, or a line half written
        return None
