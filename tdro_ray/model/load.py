"""The encoder of a model folder, whatever its format. Light: torch or onnxruntime is loaded when a folder needs it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tdro_ray.model.encoder import Encoder
    from tdro_ray.model.onnx_encoder import OnnxEncoder

ONNX_FILE = "model.onnx"


def load_encoder(folder: str | Path, device: str = "cpu") -> Encoder | OnnxEncoder:
    """Return the encoder of a tdro model folder or of an ONNX export. Raises CheckpointError or ConfigError with the mend."""
    if (Path(folder) / ONNX_FILE).exists():
        from tdro_ray.model.onnx_encoder import OnnxEncoder

        return OnnxEncoder.load(folder, device)
    from tdro_ray.model.encoder import Encoder

    return Encoder.load(folder, device)
