"""The encoder of a model folder, whatever its format. Light: torch or onnxruntime is loaded when a folder needs it."""

from __future__ import annotations

import logging
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tdro_ray.errors import ConfigError

if TYPE_CHECKING:
    from tdro_ray.model.encoder import Encoder
    from tdro_ray.model.onnx_encoder import OnnxEncoder

ONNX_FILE = "model.onnx"
LEAST_COSINE = 0.9999  # between a text's float32 vector and the one that is served
Backend = Literal["auto", "torch", "onnx"]
Dtype = Literal["auto", "float32", "bfloat16"]

log = logging.getLogger(__name__)


def load_encoder(
    folder: str | Path,
    device: str = "cpu",
    backend: Backend = "auto",
    dtype: Dtype = "float32",
    threads: int = 0,
    compile: bool = False,
) -> Encoder | OnnxEncoder:
    """Return the encoder of a tdro model folder (torch) or of an ONNX export. Raises CheckpointError or ConfigError with the mend.

    `backend` other than auto must be what the folder holds. `dtype` is torch's: bfloat16 is for the matrix products
    alone; auto takes it where the hardware has such products and sample texts keep their vectors. `threads` of a
    forward, 0 for the library's own choice. `compile` is torch's too: half a minute now, faster forwards then.
    """
    is_onnx = (Path(folder) / ONNX_FILE).exists()
    if backend != "auto" and (backend == "onnx") != is_onnx:
        mend = "`tdro export --format onnx` writes one" if backend == "onnx" else "give the model's own folder"
        raise ConfigError(
            f"The backend {backend} was asked for, and {folder} {'is an' if is_onnx else 'is no'} ONNX export: {mend}, or set "
            "serve.backend=auto."
        )
    if is_onnx:
        if dtype == "bfloat16":
            raise ConfigError(
                f"{folder} is an ONNX export, which runs in float32; bfloat16 is for its model's own folder."
            )
        if compile:
            raise ConfigError(f"{folder} is an ONNX export, which is compiled already: set serve.compile=false.")
        from tdro_ray.model.onnx_encoder import OnnxEncoder

        return OnnxEncoder.load(folder, device, threads)
    from tdro_ray.model.encoder import Encoder

    if threads:
        import torch

        torch.set_num_threads(threads)
    encoder = _fastest(folder, device) if dtype == "auto" else Encoder.load(folder, device, dtype)
    return _compiled(encoder, folder, device) if compile else encoder


def _compiled(encoder: Encoder, folder: str | Path, device: str) -> Encoder:
    """The encoder compiled, where sample texts then keep their vectors."""
    from tdro_ray.model.encoder import Encoder
    from tdro_ray.model.exported import SAMPLES

    plain = encoder.encode(SAMPLES, "passage")
    encoder.compile(SAMPLES)
    least = float((encoder.encode(SAMPLES, "passage") * plain).sum(1).min())
    if math.isfinite(least) and least >= LEAST_COSINE:
        return encoder
    log.warning("Serving %s without compiling: compiled, a sample text has cosine %.5f with its vector.", folder, least)
    return Encoder.load(folder, device, encoder.dtype)


def load_apart(*arguments: Any) -> Encoder | OnnxEncoder:
    """As `load_encoder`, for an encoder that another thread runs: loads in a thread that ends.

    Every thread that computes keeps OpenMP workers of its own. With more workers than cores in a process they sleep between
    any two operations: a forward of MiniLM takes 14 ms instead of 6.
    """
    with ThreadPoolExecutor(1, "load") as thread:
        return thread.submit(load_encoder, *arguments).result()


def _fastest(folder: str | Path, device: str) -> Encoder:
    """The encoder in bfloat16 where that pays and is exact enough, else in float32."""
    from tdro_ray.model.encoder import Encoder
    from tdro_ray.model.exported import SAMPLES

    encoder = Encoder.load(folder, device)
    if not multiplies_bfloat16(device):
        return encoder
    exact = encoder.encode(SAMPLES, "passage")
    half = Encoder(encoder.retriever, encoder.tokenizer, device, "bfloat16")  # takes the weights over
    least = float((half.encode(SAMPLES, "passage") * exact).sum(1).min())
    if math.isfinite(least) and least >= LEAST_COSINE:
        return half
    log.warning("Serving %s in float32: in bfloat16 a sample text has cosine %.5f with its vector.", folder, least)
    return Encoder.load(folder, device)


def multiplies_bfloat16(device: str) -> bool:
    """True where the device has matrix products in bfloat16, not merely an emulation of them."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # torch tells of the CPU's units by private names only.
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
