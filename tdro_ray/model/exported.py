"""Vectors of sample texts from an exported folder, made in a fresh process by every library that can load it.

`python -m tdro_ray.model.exported FOLDER OUT.npz [BASE]` writes one array per way. Of merged weights: `tdro`,
`transformers` (plain AutoModel and AutoTokenizer, pooled as the model card shows) and, where it is installed,
`sentence_transformers`. Of an adapter: `peft` on the model folder BASE. Of a graph: `onnx`, text by text, and
`onnx_batch`, all texts of a kind and task at once.
N requests, T tokens, D dimensions.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from tdro_ray.errors import CheckpointError
from tdro_ray.model.load import ONNX_FILE
from tdro_ray.model.tokenize import TextTokenizer
from tdro_ray.types import Kind

SAMPLES = (
    "a",
    "parse an ISO 8601 date",
    "Was ist ein Nachschlagewerk? — Ünïcödé, 日本語 и русский 🙂",
    "def read(path):\n    with open(path) as file:\n        return file.read()",
    "the quick brown fox jumps over the lazy dog and goes on its way " * 40,  # longer than any length: is cut
)


@dataclass(frozen=True)
class Request:
    """One text to encode."""

    text: str
    kind: Kind
    task: str = ""


def requests(tokenizer: TextTokenizer, sentence_transformers: bool = False) -> list[Request]:
    """Return the sample texts as passages and as queries of every prompted task.

    sentence-transformers has one maximum length, the passages': queries that another length would cut are left out.
    """
    spec = tokenizer.spec
    queries = [Request(text, "query", task) for task in ("", *spec.task_prompts) for text in SAMPLES]
    if sentence_transformers:
        whole = min(spec.query_length, spec.passage_length)
        queries = [r for r in queries if len(tokenizer.encode([r.text], "query", r.task)[0]) < whole]
    return [Request(text, "passage") for text in SAMPLES] + queries


def query_prompt(instruction: str) -> str:
    """Return what goes before a query: the instruction in E5's form, or nothing."""
    return f"Instruct: {instruction}\nQuery: " if instruction else ""


def main(folder: Path, out: Path, base: Path | None = None) -> None:
    """Write the vectors of all requests by every way to `out`; an adapter is put on the model folder `base`."""
    ways: dict[str, Any]
    if base is not None:
        ways = {"peft": partial(_by_peft, base=base)}
    elif (folder / ONNX_FILE).exists():
        ways = {"onnx": _by_onnx, "onnx_batch": _by_onnx_batch}
    else:
        ways = {"tdro": _by_tdro, "transformers": _by_transformers}
        if find_spec("sentence_transformers") is not None:
            ways["sentence_transformers"] = _by_sentence_transformers
    tokenizer = TextTokenizer(folder)
    np.savez(out, **{way: encode(folder, tokenizer) for way, encode in ways.items()})  # one model in memory at a time


def _by_tdro(folder: Path, tokenizer: TextTokenizer) -> np.ndarray:
    from tdro_ray.model.encoder import Encoder

    encoder = Encoder.load(folder)
    return np.concatenate([encoder.encode([r.text], r.kind, r.task) for r in requests(tokenizer)])


def _by_onnx(folder: Path, tokenizer: TextTokenizer) -> np.ndarray:
    from tdro_ray.model.onnx_encoder import OnnxEncoder

    encoder = OnnxEncoder.load(folder)
    return np.concatenate([encoder.encode([r.text], r.kind, r.task) for r in requests(tokenizer)])


def _by_onnx_batch(folder: Path, tokenizer: TextTokenizer) -> np.ndarray:
    from tdro_ray.model.onnx_encoder import OnnxEncoder

    encoder, wanted = OnnxEncoder.load(folder), requests(tokenizer)
    sequences = [tokenizer.encode([r.text], r.kind, r.task)[0] for r in wanted]
    return encoder.embed_ids(sequences, batch_tokens=sum(map(len, sequences)) * len(sequences))


def _by_peft(folder: Path, tokenizer: TextTokenizer, base: Path) -> np.ndarray:
    import torch
    from peft import PeftModel
    from transformers import AutoModel

    body = AutoModel.from_pretrained(base, dtype=torch.float32, local_files_only=True)
    return _by_transformers(folder, tokenizer, PeftModel.from_pretrained(body, folder).eval())


def _by_transformers(folder: Path, tokenizer: TextTokenizer, model: Any = None) -> np.ndarray:
    """Vectors (N, D) as a user of plain transformers makes them, all requests of a kind padded into one batch."""
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModel, AutoTokenizer

    from tdro_ray.model.pooling import POOLING
    from tdro_ray.model.tokenize import format_text

    spec, wanted = tokenizer.spec, requests(tokenizer)
    plain = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    trained = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = model or AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    parts: list[np.ndarray] = []
    for kind, length in (("passage", spec.passage_length), ("query", spec.query_length)):
        texts = [format_text(r.text, r.kind, r.task, spec) for r in wanted if r.kind == kind]
        for text, ids in zip(texts, plain(texts)["input_ids"], strict=True):
            if ids != trained.encode(text).ids:
                raise CheckpointError(
                    f"AutoTokenizer takes {type(plain).__name__} for this model, which reads {text[:60]!r} otherwise than the "
                    "tokenizer.json that it was trained with. Nobody else could use the model: train it with a tokenizer of "
                    "that class (AutoTokenizer.from_pretrained(…).save_pretrained(…) of the base model)."
                )
        inputs = plain(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        with torch.inference_mode():
            hidden_NTD = model(**inputs).last_hidden_state
        parts.append(POOLING[spec.pooling](hidden_NTD, inputs["attention_mask"]).numpy())
    return np.concatenate(parts)


def _by_sentence_transformers(folder: Path, tokenizer: TextTokenizer) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True, model_kwargs={"dtype": "float32"})
    found = []
    for r in requests(tokenizer, sentence_transformers=True):
        name = "document" if r.kind == "passage" else r.task or "query"
        found.append(model.encode([r.text], prompt_name=name, show_progress_bar=False))
    return np.concatenate(found)


if __name__ == "__main__":
    try:
        main(*map(Path, sys.argv[1:]))
    except CheckpointError as err:
        sys.exit(str(err))
