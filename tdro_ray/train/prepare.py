"""The loaded retriever made ready to train: adapters, gradient checkpointing, packed sequences, compiled blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tdro_ray.config import ModelSettings
from tdro_ray.errors import ConfigError
from tdro_ray.model import packed
from tdro_ray.model.encoder import Retriever
from tdro_ray.train.fsdp import transformer_blocks


def trainable(retriever: Retriever, model: ModelSettings) -> Retriever:
    """Return the retriever in training mode, with adapters and gradient checkpointing as `model` says."""
    retriever.train()
    backbone: Any = retriever.backbone
    if model.gradient_checkpointing:
        backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if model.lora is not None:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            r=model.lora.r,
            lora_alpha=model.lora.alpha,
            lora_dropout=model.lora.dropout,
            target_modules=list(model.lora.targets) if model.lora.targets else "all-linear",
        )
        retriever.backbone = get_peft_model(backbone, lora)
    return retriever


def speed_up(retriever: Retriever, model: ModelSettings, backend: str, device: torch.device) -> Retriever:
    """Return the retriever with packed sequences and compiled blocks as `model` says.

    Raises ConfigError where the model, its dropout or the backend rules out what was asked for.
    """
    dtype = next(retriever.parameters()).dtype
    if model.packing is True or (
        model.packing == "auto" and packed.has_kernel(retriever.backbone.config, dtype, device)
    ):
        why = packed.pack(retriever.backbone)
        if why and model.packing is True:
            raise ConfigError(
                f"model.packing=true: this model cannot train on packed sequences ({why}). Set model.packing=auto, which pads then."
            )
        retriever.packed = not why
    if model.compile:
        _compile(retriever, backend)
    return retriever


def _compile(retriever: Retriever, backend: str) -> None:
    """Compile each transformer block in place: blocks are alike, so one is compiled for all, and names stay as they are."""
    if backend != "ddp":
        raise ConfigError(
            f"model.compile works with scale.backend=ddp, not with {backend}, whose hooks gather shards inside a block. Leave one of them out."
        )
    if any(m.p > 0 for m in retriever.modules() if isinstance(m, nn.Dropout)) or _attention_dropout(retriever):
        raise ConfigError(
            "model.compile would draw other dropout masks in the second of two passes, and the gradient would be of neither. "
            "Set model.lora.dropout=0 (and no dropout in the model's config.json), or model.compile=false."
        )
    for block in transformer_blocks(retriever):
        block.compile(dynamic=True)


def _attention_dropout(retriever: Retriever) -> float:
    config: Any = retriever.backbone.config
    return float(
        getattr(config, "attention_dropout", 0.0) or getattr(config, "attention_probs_dropout_prob", 0.0) or 0.0
    )
