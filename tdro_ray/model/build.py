"""The base model folder that every stage starts from: a tiny Qwen2 built from a config, or an imported model."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tdro_ray.config import ModelSettings, TinyModel
from tdro_ray.errors import CheckpointError
from tdro_ray.model.encoder import Retriever, load_backbone, save_retriever
from tdro_ray.types import RetrieverSpec

END = "<|endoftext|>"


def build_base(settings: ModelSettings, spec: RetrieverSpec, texts: Iterator[str], folder: Path, seed: int) -> int:
    """Write the base model folder and return its number of parameters.

    `texts` train the tokenizer of a tiny model (not read otherwise); `spec` carries pooling, lengths and prompts, its
    token ids are filled in here. Raises CheckpointError when the tokenizer cannot keep the contract (see `_contract`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    if settings.name == "tiny":
        tokenizer = train_tokenizer(texts, settings.tiny.vocab_size)
        backbone = tiny_backbone(
            settings.tiny, len(tokenizer), tokenizer.eos_token_id, max(spec.query_length, spec.passage_length)
        )
    else:
        backbone = load_backbone(settings.name, settings.dtype)
        tokenizer = load_tokenizer(settings.name)
    spec = _contract(tokenizer, spec, settings)
    tokens = folder / "tokenizer"
    tokenizer.save_pretrained(tokens)
    save_retriever(Retriever(backbone, spec), tokens, folder)
    shutil.rmtree(tokens)
    return sum(p.numel() for p in backbone.parameters())


def tiny_backbone(tiny: TinyModel, vocab_size: int, eos_token_id: int, max_length: int) -> Any:
    """Return a Qwen2 body from a config. Token embeddings get standard deviation `embedding_std`: about 1 makes the
    untrained model a bag of words, from which a short run learns; the usual 0.02 does not."""
    from transformers import Qwen2Config, Qwen2Model

    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=tiny.hidden_size,
        num_hidden_layers=tiny.num_layers,
        num_attention_heads=tiny.num_heads,
        num_key_value_heads=tiny.num_heads,
        intermediate_size=tiny.intermediate_size,
        max_position_embeddings=max(512, max_length),
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=eos_token_id,
    )
    model = Qwen2Model(config)
    torch.nn.init.normal_(model.embed_tokens.weight, std=tiny.embedding_std)
    return model


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Any:
    """Return a byte-level BPE tokenizer trained on `texts` (no word is unknown to it).

    It is of the class that AutoTokenizer takes for a Qwen2 model, and splits text as that class does: another one would
    read the exported model's texts otherwise than it was trained to.
    """
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    letters = {letter: i for i, letter in enumerate([END, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    untrained = Qwen2Tokenizer(vocab=letters, merges=[], unk_token=None, eos_token=END, pad_token=END)
    return untrained.train_new_from_iterator(texts, vocab_size, show_progress=False)


def load_tokenizer(name: str) -> Any:
    """Load a fast tokenizer by folder or Hub id. Raises CheckpointError with the mend."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=Path(name).is_dir())
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise CheckpointError(
            f"Model {name!r} has no tokenizer that can be loaded ({str(err).strip().splitlines()[0][:200]}). "
            "Put tokenizer.json and tokenizer_config.json into the folder: AutoTokenizer.from_pretrained(…).save_pretrained(folder)."
        ) from err
    if not tokenizer("a b c")["input_ids"]:  # transformers makes up an empty one for a folder without tokenizer files
        raise CheckpointError(
            f"Model {name!r} has no tokenizer. Put tokenizer.json and tokenizer_config.json into the folder: "
            "AutoTokenizer.from_pretrained(…).save_pretrained(folder)."
        )
    if not getattr(tokenizer, "is_fast", False):
        raise CheckpointError(
            f"Model {name!r} has only a slow tokenizer; convert it to a fast one (tokenizer.json) first."
        )
    return tokenizer


def _contract(tokenizer: Any, spec: RetrieverSpec, settings: ModelSettings) -> RetrieverSpec:
    """Return the spec with token ids. Last-token pooling reads the final token, so every text must end in the same one."""
    from dataclasses import replace

    ends = [tokenizer(text)["input_ids"][-1:] for text in ("a", "b c")]
    closed = ends[0] == ends[1] and ends[0] != [] and ends[0][0] in tokenizer.all_special_ids
    if not closed and tokenizer.eos_token_id is None and settings.pooling == "last":
        raise CheckpointError(
            f"The tokenizer of {settings.name!r} has no EOS token, and last-token pooling reads the EOS. "
            "Set one (tokenizer.eos_token = …, save_pretrained), or set model.pooling to mean or cls."
        )
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos
    return replace(
        spec,
        append_eos=not closed and eos is not None,
        eos_token_id=0 if eos is None else int(eos),
        pad_token_id=0 if pad is None else int(pad),
    )
