"""A cross-encoder: a Hugging Face sequence classifier with one output that scores a query and a passage read together.

N pairs, B pairs of a forward, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tdro_ray.errors import CheckpointError
from tdro_ray.retrieval.chunks import CPU_ENCODE_TOKENS, length_chunks

LIKE = "such as the ones sentence-transformers trains: AutoModelForSequenceClassification with num_labels=1"


class CrossEncoder:
    """A cross-encoder, ready to score pairs."""

    def __init__(self, model: Any, tokenizer: Any, length: int, sigmoid: bool = False, device: str = "cpu") -> None:
        self.model, self.tokenizer, self.device = model.to(device).eval(), tokenizer, torch.device(device)
        known = getattr(model.config, "max_position_embeddings", None) or length
        self.length, self.sigmoid = min(length, int(known)), sigmoid

    @classmethod
    def load(cls, name: str | Path, length: int, sigmoid: bool = False, device: str = "cpu") -> CrossEncoder:
        """Load a folder or Hub id. Raises CheckpointError for one that is no cross-encoder, with the mend."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        check(name)
        with _explained(name):
            local = Path(name).is_dir()
            model = AutoModelForSequenceClassification.from_pretrained(str(name), local_files_only=local)
            tokenizer = AutoTokenizer.from_pretrained(str(name), local_files_only=local)
        if model.config.pad_token_id is None:  # decoders: the score is read at the last token that is no padding
            model.config.pad_token_id = tokenizer.pad_token_id
        return cls(model, tokenizer, length, sigmoid, device)

    @torch.inference_mode()
    def score(self, queries: Sequence[str], passages: Sequence[str], batch_tokens: int = 16384) -> np.ndarray:
        """Return the float32 scores (N,) of the pairs, run by length in chunks of `batch_tokens`."""
        scores_N = np.zeros(len(queries), np.float32)
        if not len(queries):
            return scores_N
        found = self.tokenizer(list(queries), list(passages), truncation="longest_first", max_length=self.length)
        budget = min(batch_tokens, CPU_ENCODE_TOKENS) if self.device.type == "cpu" else batch_tokens
        length_N = np.array([len(ids) for ids in found["input_ids"]])
        for chunk in length_chunks(length_N, budget):
            part = {key: [values[i] for i in chunk] for key, values in found.items()}
            padded = self.tokenizer.pad(part, padding=True, return_tensors="pt").to(self.device)
            score_B = self.model(**padded).logits[:, 0].float()
            scores_N[chunk] = (score_B.sigmoid() if self.sigmoid else score_B).cpu().numpy()
        return scores_N


def check(name: str | Path) -> None:
    """Read the model's configuration only. Raises CheckpointError for one that is no cross-encoder, with the mend."""
    from transformers import AutoConfig

    with _explained(name):
        config = AutoConfig.from_pretrained(str(name), local_files_only=Path(name).is_dir())
    if config.num_labels != 1:
        raise CheckpointError(
            f"Cross-encoder {str(name)!r} has {config.num_labels} outputs, it must have one, the score. Set mine.rescore.model to one, {LIKE}."
        )


@contextmanager
def _explained(name: str | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as err:
        reason = " ".join(str(err).split())[:300] or type(err).__name__
        where = "folder" if Path(name).is_dir() else "Hub id (no such folder here, and no hub gave it)"
        raise CheckpointError(
            f"Cross-encoder {str(name)!r} cannot be loaded from that {where}: {reason} Set mine.rescore.model to one, {LIKE}."
        ) from err
