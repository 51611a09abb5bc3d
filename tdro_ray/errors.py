"""The errors a user can meet. Each message says what failed, the value, what is valid, what to do next.

The CLI prints the message of a `TdroError` and exits with 2; anything else is a defect of ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TdroError(Exception):
    """Base of all errors that a user can cause and mend."""


class ConfigError(TdroError):
    """A recipe, a `--set` or a combination of settings is not valid."""


class DataError(TdroError):
    """A source file or a collection store is not usable (the message names file and line)."""


class CheckpointError(TdroError):
    """A model folder or a checkpoint cannot be loaded or does not fit the run."""


class ResourceError(TdroError):
    """The machine or the cluster cannot give what a stage asks for."""


def nearest(word: str, valid: Iterable[str], count: int = 3) -> str:
    """Return ``" Did you mean …?"`` for the valid words nearest to `word`, or the list of valid ones."""
    valid = sorted(valid)
    close = difflib.get_close_matches(word, valid, n=count, cutoff=0.5)
    if close:
        return f" Did you mean {' or '.join(repr(c) for c in close)}?"
    return f" Valid: {', '.join(valid)}."
