"""Ray Tune without its own console output, and without its handling of Ctrl-C, which would end a study as if it were done."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

SETTINGS = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints a header whatever the verbosity
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths of a recipe mean the same in a trial
}
LOGGERS = ("ray.tune", "ray.train", "ray.air")


@contextmanager
def quiet_tune() -> Iterator[None]:
    """While the block runs: no table, no log line of a failed trial (its error is in our list of trials)."""
    before = {name: os.environ.get(name) for name in SETTINGS}
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    os.environ.update(SETTINGS)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
