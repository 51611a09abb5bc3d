"""Text to token ids by the Rust tokenizer, with prompts, truncation and a guaranteed EOS. Needs neither torch nor transformers.

Light on purpose: every Ray Data task and every server process loads it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tdro_ray.errors import CheckpointError
from tdro_ray.types import Kind, RetrieverSpec

SPEC_FILE = "tdro.json"
CHARACTERS_PER_TOKEN = 24  # text beyond length x 24 characters is cut before tokenising: it would be truncated anyway


def write_spec(folder: Path, spec: RetrieverSpec) -> None:
    """Write `tdro.json` beside the Hugging Face files."""
    (folder / SPEC_FILE).write_text(json.dumps(asdict(spec), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_spec(folder: Path) -> RetrieverSpec:
    """Read `tdro.json`; raises CheckpointError when it is missing or not ours."""
    path = Path(folder) / SPEC_FILE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        lengths = {task: tuple(pair) for task, pair in raw.get("task_lengths", {}).items()}
        symmetric = tuple(raw.get("symmetric_tasks", ()))
        return RetrieverSpec(**{**raw, "symmetric_tasks": symmetric, "task_lengths": lengths})
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} is not a tdro model folder: it has no {SPEC_FILE}. Train one, or name it as model.name to import it."
        ) from None
    except (ValueError, TypeError) as err:
        raise CheckpointError(f"{path} is damaged: {err}. Run the stage that wrote it again.") from err


class TextTokenizer:
    """Token ids of queries and passages as the encoder reads them."""

    def __init__(self, folder: str | Path, spec: RetrieverSpec | None = None) -> None:
        folder = Path(folder)
        self.spec = spec or read_spec(folder)
        path = folder / "tokenizer.json"
        if not path.exists():
            raise CheckpointError(
                f"{folder} has no tokenizer.json. Save a fast tokenizer there: AutoTokenizer.from_pretrained(…).save_pretrained({str(folder)!r})."
            )
        self._path, self._by_length = path, dict[int | None, Any]()
        for length in {self.spec.query_length, self.spec.passage_length}:
            self._cutting(length)

    def encode(self, texts: Sequence[str], kind: Kind, task: str = "") -> list[list[int]]:
        """Return token ids, at most the length of kind and task, each ending in EOS (or the tokenizer's own final token)."""
        spec = self.spec
        length = spec.length(kind, task)
        texts = [format_text(text, kind, task, spec)[: length * CHARACTERS_PER_TOKEN] for text in texts]
        encodings = self._cutting(length).encode_batch_fast(texts)
        if spec.append_eos:
            return [[*e.ids, spec.eos_token_id] for e in encodings]
        return [e.ids for e in encodings]

    def _cutting(self, length: int | None) -> Any:
        """Return the tokenizer that cuts at this length (None: never), the EOS that is put on aside; one is kept for each."""
        from tokenizers import Tokenizer

        if length not in self._by_length:
            tokenizer = Tokenizer.from_file(str(self._path))
            tokenizer.no_padding()
            tokenizer.no_truncation()
            if length is not None:
                tokenizer.enable_truncation(length - self.spec.append_eos)
            self._by_length[length] = tokenizer
        return self._by_length[length]

    def count(self, texts: Sequence[str], kind: Kind, task: str = "") -> list[int]:
        """Return how many tokens each text has before truncation, prompts and EOS included."""
        texts = [format_text(text, kind, task, self.spec) for text in texts]
        return [len(e.ids) + self.spec.append_eos for e in self._cutting(None).encode_batch_fast(texts)]


def format_text(text: str, kind: Kind, task: str, spec: RetrieverSpec) -> str:
    """Return the text with its task's instruction, E5 style (Wang et al. 2024, eq. 1): on queries, and on both sides
    of a symmetric task."""
    prompt = spec.task_prompts.get(task, spec.query_prompt)
    if prompt and (kind == "query" or task in spec.symmetric_tasks):
        return f"Instruct: {prompt}\nQuery: {text}"
    return text
