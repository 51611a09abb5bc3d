"""The shapes of a model's parameters, known without its weights. torch is loaded only where nothing else tells them.

In this order: a tiny model's from its settings; safetensors headers of a folder or of the Hub cache; `config.json`, the
model built on the meta device.
"""

from __future__ import annotations

import json
import threading
import urllib.request
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from tdro_ray.config import LoraSettings, ModelSettings, TinyModel
from tdro_ray.errors import CheckpointError

HUB_SECONDS = 2.0  # that a Hub id's config.json is waited for
LAYERS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
HIDDEN = ("hidden_size", "dim", "n_embd", "d_model")


@dataclass(frozen=True)
class ModelShapes:
    """What memory and time depend on."""

    shapes: dict[str, tuple[int, ...]]  # parameter name -> shape
    layers: int
    hidden: int

    @property
    def parameters(self) -> int:
        return sum(prod(s) for s in self.shapes.values())

    @property
    def body(self) -> int:
        """Parameters that every token passes: all but the embeddings, which are looked up."""
        return sum(prod(s) for name, s in self.shapes.items() if "embed" not in name)

    def trainable(self, lora: LoraSettings | None) -> int:
        """Parameters that are trained: all, or r (in + out) of every adapted matrix."""
        if lora is None:
            return self.parameters
        matrices = [
            s
            for name, s in self.shapes.items()
            if len(s) == 2 and "embed" not in name and (not lora.targets or name.split(".")[-2] in lora.targets)
        ]
        return sum(lora.r * sum(s) for s in matrices)


def model_shapes(model: ModelSettings) -> ModelShapes:
    """Return the shapes of the model that `model` names. Raises CheckpointError with the reason where they are unknown."""
    if model.name == "tiny":
        return ModelShapes(_tiny(model.tiny), model.tiny.num_layers, model.tiny.hidden_size)
    folder = Path(model.name) if Path(model.name).is_dir() else _cached(model.name)
    config = _config(folder) if folder else _fetched(model.name)
    found = _headers(folder) if folder else {}
    shapes = found or _on_meta(model.name, config)
    return ModelShapes(shapes, _first(config, LAYERS, model.name), _first(config, HIDDEN, model.name))


def _tiny(tiny: TinyModel) -> dict[str, tuple[int, ...]]:
    """A Qwen2 of these settings, its vocabulary as large as it may become."""
    h, i = tiny.hidden_size, tiny.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (tiny.vocab_size, h), "norm.weight": (h,)}
    for layer in range(tiny.num_layers):
        at = f"layers.{layer}"
        shapes |= {f"{at}.self_attn.{p}_proj.weight": (h, h) for p in "qkvo"}
        shapes |= {f"{at}.self_attn.{p}_proj.bias": (h,) for p in "qkv"}
        shapes |= {f"{at}.mlp.{p}_proj.weight": (i, h) for p in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (h, i)}
        shapes |= {f"{at}.{p}_layernorm.weight": (h,) for p in ("input", "post_attention")}
    return shapes


def _headers(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes from the headers of safetensors files, without a language model's head; {} where a file is missing."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.exists():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    shapes: dict[str, tuple[int, ...]] = {}
    for path in (folder / name for name in names):
        if not path.exists():
            return {}
        try:
            with safe_open(path, "np") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as err:
            raise CheckpointError(f"{path} cannot be read: {err}") from err
    return {name: shape for name, shape in shapes.items() if not name.startswith(("lm_head.", "cls."))}


def _on_meta(name: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    import torch
    from transformers import AutoConfig, AutoModel

    try:
        fields = {k: v for k, v in config.items() if k != "model_type"}
        with torch.device("meta"):
            body = AutoModel.from_config(AutoConfig.for_model(config["model_type"], **fields))
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise CheckpointError(f"the config.json of {name} makes no model: {str(err).splitlines()[0][:120]}") from err
    return {n: tuple(p.shape) for n, p in body.named_parameters()}


def _config(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as err:
        raise CheckpointError(f"{folder} has no config.json that can be read") from err


def _cached(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, "config.json")
    except ValueError as err:  # no valid Hub id
        raise CheckpointError(f"{name!r} is neither a folder nor a Hub id") from err
    return Path(found).parent if isinstance(found, str) else None


def _fetched(name: str) -> dict[str, Any]:
    """The config.json of a Hub id, read and not kept; asked for in a thread, since a name server may be slow to fail."""
    from huggingface_hub import constants

    reason = f"the Hub did not answer within {HUB_SECONDS:g} s"
    found: dict[str, Any] = {}
    if constants.HF_HUB_OFFLINE:
        raise CheckpointError(f"{name} is not in the Hub cache, and HF_HUB_OFFLINE is set")

    def ask() -> None:
        nonlocal reason
        try:
            url = f"{constants.ENDPOINT}/{name}/resolve/main/config.json"
            with urllib.request.urlopen(url, timeout=HUB_SECONDS) as answer:
                found.update(json.load(answer))
        except (OSError, ValueError) as err:
            reason = str(err)[:120]

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    if not found:
        raise CheckpointError(f"{name} is not in the Hub cache, and cannot be reached ({reason})")
    return found


def _first(config: dict[str, Any], keys: tuple[str, ...], name: str) -> int:
    found = next((config[k] for k in keys if isinstance(config.get(k), int)), None)
    if found is None:
        raise CheckpointError(f"the config.json of {name} has none of {', '.join(keys)}")
    return int(found)
