"""A LoRA adapter alone, in peft's layout, with a reference to the base model that it belongs on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tdro_ray.errors import CheckpointError, ConfigError
from tdro_ray.model.encoder import ADAPTER

CONFIG = "adapter_config.json"
LEAST_COSINE_ROUNDED = 0.999  # merged weights that were rounded to bfloat16, against base and adapter apart


def write_lora(model_folder: Path, out: Path, reference: str) -> None:
    """Write the adapter of a model folder; `reference` is what `AutoModel.from_pretrained` takes for its base."""
    config = _adapter_config(model_folder)
    for file in (model_folder / ADAPTER).glob("adapter_model*"):
        shutil.copy2(file, out / file.name)
    config |= {"base_model_name_or_path": reference, "task_type": "FEATURE_EXTRACTION", "inference_mode": True}
    (out / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def base_model(model_folder: Path, run_folder: Path) -> Path:
    """Return the local folder of the weights that the adapter was trained on; raises CheckpointError where it is gone."""
    named = Path(str(_adapter_config(model_folder).get("base_model_name_or_path")))
    for folder in (named, run_folder / "stages" / "model" / "base"):
        if (folder / "config.json").exists():
            return folder
    raise CheckpointError(
        f"The base model of the adapter is gone ({named}), so it cannot be checked. Run `tdro run` again, or use --format hf."
    )


def base_reference(model_folder: Path, run_folder: Path) -> str:
    """Return the Hub id that the recipe names, or the folder of the base model where it is no Hub model."""
    try:
        name = json.loads((run_folder / "config.json").read_text(encoding="utf-8"))["model"]["name"]
    except (OSError, ValueError, KeyError):
        name = "tiny"
    if name == "tiny":
        return str(base_model(model_folder, run_folder).resolve())
    return str(Path(name).resolve()) if Path(name).is_dir() else str(name)


def is_rounded(model_folder: Path) -> bool:
    """Return whether the merged weights are of less than float32."""
    config = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))
    return str(config.get("dtype", config.get("torch_dtype"))) not in ("float32", "float64")


def _adapter_config(model_folder: Path) -> dict[str, Any]:
    path = model_folder / ADAPTER / CONFIG
    if not path.exists():
        raise ConfigError(
            f"{model_folder} has no LoRA adapter: the model was trained in full. Use --format hf, or train with "
            "--set model.lora.r=16 (a model trained before adapters were kept has to be trained again)."
        )
    return dict(json.loads(path.read_text(encoding="utf-8")))
