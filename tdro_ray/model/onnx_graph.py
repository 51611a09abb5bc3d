"""A retriever as one ONNX graph: token ids and mask (B, T) to unit vectors (B, D), batch and length dynamic."""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from tdro_ray.errors import CheckpointError, ConfigError
from tdro_ray.model.load import ONNX_FILE

OPSET = 18  # the exporter's native one; every onnxruntime since 1.14 runs it
SOURCE_FILE = "onnx.json"  # hash of the model that the graph was made of: an index of that model fits this one


def write_onnx(model_folder: Path, out: Path, source_hash: str = "") -> None:
    """Write the graph (`model.onnx`, weights in `model.onnx.data`) in float32, pooling and normalisation included.

    Raises ConfigError where onnx and onnxscript are not installed, CheckpointError for a model that cannot be traced.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"--format onnx needs {', '.join(missing)}: pip install 'tdro-ray[onnx]'.")
    import torch

    from tdro_ray.model.encoder import load_retriever

    retriever = load_retriever(model_folder).eval()
    # An example of uneven lengths, no dimension 0 or 1: the tracer takes those for constants.
    ids_BT = torch.tensor([[1, 2, 3, 4, 5], [5, 4, 3, 0, 0], [1, 0, 0, 0, 0]])
    mask_BT = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    try:
        with torch.inference_mode(), _quiet():
            torch.onnx.export(
                retriever,
                (ids_BT, mask_BT),
                str(out / ONNX_FILE),
                input_names=["ids", "mask"],
                output_names=["vectors"],
                dynamic_shapes=(dynamic, dynamic),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    except Exception as err:  # whatever a model's forward makes the tracer raise
        kind = type(retriever.backbone).__name__
        raise CheckpointError(
            f"{kind} cannot be written as ONNX by torch {torch.__version__}: {str(err).strip().splitlines()[0][:300]}. "
            "Nothing was written; --format hf works for every model."
        ) from err
    (out / SOURCE_FILE).write_text(
        json.dumps({"source_hash": source_hash, "opset": OPSET}, indent=2) + "\n", encoding="utf-8"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of what it leaves out for packages that are not installed."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
