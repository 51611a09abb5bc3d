"""Texts of a request: what is refused, and their token ids. Knows the limits and the tokenizer, not the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serve.guard import RequestError
from serve.schemas import Limits
from tdro_ray.errors import nearest
from tdro_ray.index.filters import is_unicode
from tdro_ray.types import RetrieverSpec


class TextError(RequestError):
    """A text that the model cannot read, by its place in the request."""

    def __init__(self, place: int, message: str) -> None:
        super().__init__(422, "invalid_request", f"texts[{place}] {message}")
        self.place, self.reason = place, message

    def at(self, place: int) -> TextError:
        """The same of a text at another place."""
        return TextError(place, self.reason)


def check_texts(texts: Sequence[str], limits: Limits) -> None:
    """Raise RequestError for too many or too long texts, empty ones, and ones that are not Unicode."""
    check_count("texts", len(texts), limits)
    for place, text in enumerate(texts):
        if len(text) > limits.max_characters:
            limit = limits.max_characters
            raise RequestError(
                413, "text_too_long", f"texts[{place}] has {len(text)} characters, at most {limit} are taken."
            )
        if not text.strip():
            raise RequestError(422, "invalid_request", f"texts[{place}] is empty.")
        if not is_unicode(text):
            raise RequestError(
                422, "invalid_request", f"texts[{place}] holds a lone surrogate; it is not valid Unicode."
            )


def check_count(what: str, count: int, limits: Limits) -> None:
    """Raise RequestError for none or too many texts, queries or vectors."""
    if count == 0:
        raise RequestError(422, "invalid_request", f"{what} is empty; give at least one.")
    if count > limits.max_batch:
        raise RequestError(
            413,
            "batch_too_large",
            f"{count} {what} were sent, at most {limits.max_batch} are taken per request.",
        )


def check_task(task: str, spec: RetrieverSpec) -> None:
    """Raise RequestError for a task that the model has no prompt for."""
    known = {*spec.task_prompts, *spec.symmetric_tasks, *spec.task_lengths}
    if task and task not in known:
        hint = nearest(task[:64], known) if known else " It knows none: leave task out."
        raise RequestError(422, "unknown_task", f"The model has no prompt for task {task!r:.80}.{hint}")


def tokenize(encoder: Any, texts: Sequence[str], kind: str, task: str, truncate: str) -> list[list[int]]:
    """Return the token ids of each text. Raises TextError for one without tokens, or too long under `truncate="error"`."""
    sequences = encoder.tokenizer.encode(texts, kind, task)
    for place, sequence in enumerate(sequences):
        if not sequence:
            raise TextError(place, "holds no token that the model knows.")
    if truncate == "error":
        limit = encoder.spec.length(kind, task)
        for place, count in enumerate(encoder.tokenizer.count(texts, kind, task)):
            if count > limit:
                raise TextError(
                    place,
                    f"has {count} tokens, prompts included, and the model reads {limit} of a {kind}; shorten it, or send "
                    'truncate="end".',
                )
    return sequences


def number(value: int) -> str:
    """Return a number for a message."""
    return str(value) if abs(value) < 10**30 else "an integer of more than 30 digits"
