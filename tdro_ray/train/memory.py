"""How much memory a worker of a training run will need, before anything is loaded. Pure arithmetic over file headers.

The figures are bytes at the peak of a step: two passes in chunks of the token budget, AdamW, attention that keeps no
score matrix (SDPA). What other processes take is not in them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from pathlib import Path

from tdro_ray.config import LoraSettings, ModelSettings, ScaleSettings, TrainSettings, least_workers
from tdro_ray.errors import CheckpointError, ResourceError
from tdro_ray.model.shapes import ModelShapes, model_shapes

RUNTIME = 1.0e9  # Python, torch, transformers, collectives; on a GPU the CUDA context and NCCL's buffers
LIVE_STAGE3 = 1e9  # parameters that ZeRO-3 keeps whole at once, its default
BUCKET_ELEMENTS = 5e7  # of a reduction, see deepspeed_zero.BUCKET
ALLOCATOR_SLACK = 1.25  # on activations, whose blocks come and go
LOSS_ROWS = 512  # rows of the loss matrix held at a time, see step.LOSS_BLOCK
LOSS_COPIES = 5  # of a block of the loss matrix: scores, mask, softmax, gradients


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model and of its training."""

    parameters: int
    trained: int
    block: int  # parameters of one layer
    layers: int
    hidden: int
    intermediate: int


def read_shape(folder: Path, lora: LoraSettings | None) -> ModelShape | None:
    """Return the shape of a model folder, or None where its config and weights' headers do not tell."""
    try:
        return shape_of(model_shapes(ModelSettings(name=str(folder))), lora)
    except CheckpointError:
        return None


def shape_of(shapes: ModelShapes, lora: LoraSettings | None) -> ModelShape:
    """Return the shape of a model whose parameters' shapes alone are known."""
    in_layers = [s for name, s in shapes.shapes.items() if re.search(r"\.\d+\.", f".{name}")]
    block = sum(prod(s) for s in in_layers) // max(1, shapes.layers)
    widest = max((max(s) for s in in_layers), default=4 * shapes.hidden)
    return ModelShape(shapes.parameters, shapes.trainable(lora), block, shapes.layers, shapes.hidden, widest)


def estimate(
    shape: ModelShape, model: ModelSettings, settings: TrainSettings, scale: ScaleSettings
) -> dict[str, float]:
    """Return bytes of one worker by part: weights, gradients, optimiser, activations, embeddings, runtime."""
    width = 2 if model.dtype == "bfloat16" else 4
    backend, n = scale.backend, max(1, least_workers(scale))
    # Trained weights are stepped in float32, and their gradients summed in it; DeepSpeed sums in the model's type.
    trained_width = width if backend.startswith("zero") else 4
    whole, trained = shape.parameters * width, shape.trained * trained_width
    copies = shape.trained * 4 if width == 2 and model.lora is None else 0  # peft's adapters are float32 themselves
    rest = (shape.parameters - shape.layers * shape.block) * width  # embeddings: whole during a step
    bucket = min(BUCKET_ELEMENTS, shape.trained) * trained_width
    master, host = shape.trained * 4 / n, scale.offload != "none" and scale.use_gpu
    live = 0.0 if n == 1 else min(LIVE_STAGE3, shape.parameters) * width
    weights = {
        "ddp": whole + copies,
        "fsdp": (copies or whole) / n + (0 if n == 1 else rest + 2 * shape.block * width),
        "zero1": whole + master * (not host),
        "zero2": whole + master * (not host),
        "zero3": whole / n * (scale.offload != "parameters" or not host) + live + master * (not host),
    }[backend]
    gradients = {
        "ddp": 2 * trained,  # and the flat copy that is reduced
        "fsdp": trained + trained / n,  # whole until the step's last backward
        "zero1": trained + master + bucket,
        "zero2": trained / n + master + bucket,
        "zero3": trained / n + master + bucket,
    }[backend]
    moments = 2 * trained if backend == "ddp" else 2 * trained / n if backend == "fsdp" else 2 * master * (not host)
    rows = -(-settings.batch_size // n)
    sequences, passages = rows * (2 + settings.num_negatives), settings.batch_size * (1 + settings.num_negatives)
    vectors = (2 * sequences + 3 * passages) * shape.hidden * 4
    return {
        "weights": float(weights),
        "gradients": float(gradients),
        "optimiser": float(moments),
        "activations": _activations(shape, model, settings, width),
        "embeddings": float(vectors + LOSS_COPIES * 4 * min(LOSS_ROWS, rows) * passages),
        "runtime": RUNTIME,
    }


def check_memory(
    shape: ModelShape,
    model: ModelSettings,
    settings: TrainSettings,
    scale: ScaleSettings,
    available: float,
    adjustable: str = "finetune",
) -> None:
    """Raise ResourceError where a worker needs more than `available` bytes, naming the settings that lower it.

    `adjustable` is the recipe's section that `settings` come from.
    """
    parts = estimate(shape, model, settings, scale)
    need = sum(parts.values())
    if need <= available:
        return
    found = []
    for name, changed_model, changed_settings, changed_scale in _mends(model, settings, scale, adjustable):
        changed_shape = shape
        if changed_model.lora is not None and model.lora is None:
            changed_shape = _with_adapters(shape, changed_model.lora)
        then = sum(estimate(changed_shape, changed_model, changed_settings, changed_scale).values())
        if then < 0.95 * need:
            found.append((then, name))
    enough = [f"{name} ({_gb(then)} GB)" for then, name in sorted(found) if then <= available]
    some = [f"{name} ({_gb(then)} GB)" for then, name in sorted(found) if then > available]
    advice = (
        f"set {', or '.join(enough)}"
        if enough
        else f"no single setting is enough, together these lower it: {', '.join(some)}"
    )
    unit = "GPU" if scale.use_gpu else "worker"
    listed = ", ".join(f"{part} {_gb(size)}" for part, size in parts.items())
    raise ResourceError(
        f"Training needs about {_gb(need)} GB per {unit} ({listed}); {_gb(available)} available: {advice}."
    )


def _mends(
    model: ModelSettings, settings: TrainSettings, scale: ScaleSettings, adjustable: str
) -> list[tuple[str, ModelSettings, TrainSettings, ScaleSettings]]:
    """Settings that could lower the need, each alone."""
    tried: list[tuple[str, ModelSettings, TrainSettings, ScaleSettings]] = []
    for backend in ("fsdp", "zero2", "zero3"):
        if scale.backend != backend and least_workers(scale) > 1:
            clean = {"backend": backend, "offload": "none", "deepspeed": {}}
            tried.append((f"scale.backend={backend}", model, settings, scale.model_copy(update=clean)))
    if scale.backend.startswith("zero") and scale.offload == "none" and scale.use_gpu:
        tried.append(("scale.offload=optimizer", model, settings, scale.model_copy(update={"offload": "optimizer"})))
    if not model.gradient_checkpointing:
        checkpointed = model.model_copy(update={"gradient_checkpointing": True})
        tried.append(("model.gradient_checkpointing=true", checkpointed, settings, scale))
    if model.dtype == "float32":
        tried.append(("model.dtype=bfloat16", model.model_copy(update={"dtype": "bfloat16"}), settings, scale))
    if model.lora is None:
        adapters = model.model_copy(update={"lora": LoraSettings()})
        tried.append((f"model.lora={{r: {LoraSettings().r}}}", adapters, settings, scale))
    longest = max(model.query_length, model.passage_length)
    if settings.token_budget > longest:
        budget = max(longest, settings.token_budget // 4)
        smaller = settings.model_copy(update={"token_budget": budget})
        tried.append((f"{adjustable}.token_budget={budget}", model, smaller, scale))
    return tried


def _activations(shape: ModelShape, model: ModelSettings, settings: TrainSettings, width: int) -> float:
    """Bytes kept for one chunk's backward: per layer and token about 12 vectors of the hidden size (norms, q, k, v,
    attention, residuals) and 5 of the feed-forward's, and once more for the gradients of the layer at work; with
    checkpointing one input a layer and one layer whole. Within 10 % of four measured CPU runs with the slack."""
    tokens = max(settings.token_budget, model.query_length, model.passage_length)
    layer = (12 * shape.hidden + 5 * shape.intermediate) * width
    kept = shape.layers * shape.hidden * width + layer if model.gradient_checkpointing else shape.layers * layer
    return float(ALLOCATOR_SLACK * tokens * (kept + layer))


def _with_adapters(shape: ModelShape, lora: LoraSettings) -> ModelShape:
    """Adapters on all linear layers, their sizes taken from the layer's own: 4 h x h and 3 h x f about."""
    h, f = shape.hidden, shape.intermediate
    trained = shape.layers * lora.r * (4 * 2 * h + 3 * (h + f))
    return ModelShape(shape.parameters, trained, shape.block, shape.layers, h, f)


def _gb(size: float) -> str:
    return f"{size / 1e9:.0f}" if size >= 10e9 else f"{size / 1e9:.1f}"
