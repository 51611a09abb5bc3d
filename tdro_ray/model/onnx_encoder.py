"""Vectors from an ONNX export by onnxruntime on a CPU, with the interface of `encoder.Encoder`. Needs no torch.

B sequences, T tokens, D dimensions, N texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tdro_ray.errors import CheckpointError, ConfigError
from tdro_ray.model.load import ONNX_FILE
from tdro_ray.model.tokenize import TextTokenizer
from tdro_ray.retrieval.chunks import CPU_ENCODE_TOKENS, embed_in_chunks, pad_rows
from tdro_ray.types import Kind


class OnnxEncoder:
    """An ONNX export, ready to turn texts into vectors."""

    def __init__(self, session: Any, tokenizer: TextTokenizer) -> None:
        self.session, self.tokenizer, self.spec = session, tokenizer, tokenizer.spec
        self._inputs = {value.name for value in session.get_inputs()}

    @property
    def dim(self) -> int:
        """Dimensions of a vector."""
        return int(self.session.get_outputs()[0].shape[1])

    @property
    def backend(self) -> str:
        """What runs it, for `/info` and the logs."""
        return "onnxruntime float32 on cpu"

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu", threads: int = 0) -> OnnxEncoder:
        """Load an ONNX export; `threads` 0 takes one per core. Raises ConfigError without onnxruntime or for another
        device than the CPU, CheckpointError for a graph that cannot be read."""
        if device != "cpu":
            raise ConfigError(
                f"{folder} is an ONNX export, which runs on the CPU; {device!r} was asked for. Use the model's own folder there."
            )
        try:
            import onnxruntime
        except ImportError as err:
            raise ConfigError(
                f"{folder} is an ONNX export and onnxruntime is not installed: pip install 'tdro-ray[onnx]'."
            ) from err
        try:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            session = onnxruntime.InferenceSession(
                str(Path(folder) / ONNX_FILE), options, providers=["CPUExecutionProvider"]
            )
        except Exception as err:  # onnxruntime's errors share no base of their own
            raise CheckpointError(f"{Path(folder) / ONNX_FILE} cannot be read: {err}. Export the model again.") from err
        return cls(session, TextTokenizer(folder))

    def encode(self, texts: Sequence[str], kind: Kind, task: str = "", batch_tokens: int = 16384) -> np.ndarray:
        """Return float32 unit vectors (N, D) in the order of the texts."""
        return self.embed_ids(self.tokenizer.encode(texts, kind, task), batch_tokens)

    def embed_ids(self, sequences: Sequence[Sequence[int]], batch_tokens: int = 16384) -> np.ndarray:
        """Return float32 unit vectors (N, D) of token id sequences, run by length in chunks of `batch_tokens`."""

        def run(flat: np.ndarray, offset_N: np.ndarray, length_N: np.ndarray, chunk: np.ndarray) -> np.ndarray:
            ids_BT = pad_rows(flat, offset_N, length_N, chunk, self.spec.pad_token_id)
            mask_BT = (np.arange(ids_BT.shape[1]) < length_N[chunk, None]).astype(np.int64)
            given = {"ids": ids_BT, "mask": mask_BT}  # a graph that needs no mask has no such input
            return np.asarray(self.session.run(None, {k: v for k, v in given.items() if k in self._inputs})[0])

        return embed_in_chunks(sequences, self.dim, min(batch_tokens, CPU_ENCODE_TOKENS), run)
