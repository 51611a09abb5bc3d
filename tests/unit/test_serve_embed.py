"""The served embedder: every backend gives the training model's vectors, and repeated texts cost nothing."""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_export import PROMPTS, cosines, make_model, make_run

from serve.engine import Engine
from tdro_ray.errors import ConfigError
from tdro_ray.index.versions import model_hash
from tdro_ray.model import encoder as encoder_module
from tdro_ray.model import export as export_module
from tdro_ray.model import load
from tdro_ray.model.encoder import Encoder
from tdro_ray.model.export import export
from tdro_ray.model.load import load_encoder

TEXTS = ["date", "parse an ISO 8601 date", *(str(f.__doc__) for f in (json.loads, textwrap.wrap, argparse))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    root = tmp_path_factory.mktemp("backends")
    model = make_model(root / "model", task_prompts=PROMPTS, query_length=48, passage_length=200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            export_module, "_check", lambda *_: None
        )  # in a fresh process: the tests below compare themselves
        yield folders_of(root, model)


def folders_of(root: Path, model: Path) -> dict[str, Path]:
    graph = export(model, root / "onnx", make_run(root / "run"), "current", "onnx", model_hash(model))
    return {"torch": model, "onnx": graph}


def served(folder: Path, **options: Any) -> tuple[np.ndarray, str]:
    """Vectors of TEXTS as passages and as queries of a task, through the engine, and the backend's name."""

    async def ask(engine: Engine) -> np.ndarray:
        parts = [await engine.embed(TEXTS, "passage"), await engine.embed(TEXTS, "query", "questions")]
        return np.concatenate([vectors for vectors, _ in parts])

    engine = Engine.open(folder, **options)
    try:
        return asyncio.run(ask(engine)), engine.info()["model"]["backend"]
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("folder", "options", "backend"),
    [
        ("torch", {"dtype": "float32"}, "torch float32 on cpu"),
        ("torch", {"dtype": "bfloat16", "backend": "torch"}, "torch bfloat16 on cpu"),
        ("torch", {"dtype": "auto", "threads": 1}, "torch (bfloat16|float32) on cpu"),
        ("onnx", {"threads": 1}, "onnxruntime float32 on cpu"),
        ("onnx", {"backend": "onnx"}, "onnxruntime float32 on cpu"),
    ],
)
def test_every_backend_serves_the_training_models_vectors(
    folders: dict[str, Path], folder: str, options: dict[str, Any], backend: str
) -> None:
    trained = Encoder.load(folders["torch"])
    expected = np.concatenate([trained.encode(TEXTS, "passage"), trained.encode(TEXTS, "query", "questions")])
    found, name = served(folders[folder], **options)
    assert cosines(found, expected).min() >= 0.9999
    assert re.fullmatch(backend, name)


def test_bfloat16_is_dropped_where_it_moves_the_vectors(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def too_coarse(module: torch.nn.Module) -> None:
        for layer in module.modules():
            if type(layer) is torch.nn.Linear:
                layer.weight.data = torch.randn_like(layer.weight)

    monkeypatch.setattr(load, "multiplies_bfloat16", lambda device: True)
    assert load_encoder(folders["torch"], dtype="auto").dtype == "bfloat16"
    monkeypatch.setattr(encoder_module, "halve_linears", too_coarse)
    found = load_encoder(folders["torch"], dtype="auto")
    assert found.dtype == "float32" and "in float32: in bfloat16 a sample text has cosine" in caplog.text
    np.testing.assert_array_equal(found.encode(TEXTS, "query"), Encoder.load(folders["torch"]).encode(TEXTS, "query"))
    monkeypatch.setattr(load, "multiplies_bfloat16", lambda device: False)
    assert load_encoder(folders["torch"], dtype="auto").dtype == "float32"


def test_a_folder_of_another_backend_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"onnx was asked for, and .*no ONNX export: `tdro export --format onnx`"):
        load_encoder(folders["torch"], backend="onnx")
    with pytest.raises(
        ConfigError, match=r"torch was asked for, and .* is an ONNX export: give the model's own folder"
    ):
        load_encoder(folders["onnx"], backend="torch")
    with pytest.raises(ConfigError, match="runs in float32"):
        load_encoder(folders["onnx"], dtype="bfloat16")


def test_the_recipe_may_ask_for_onnxruntime(folders: dict[str, Path], tmp_path: Path) -> None:
    from types import SimpleNamespace

    from tdro_ray.commands import _for_backend
    from tdro_ray.config import ServeSettings

    run: Any = SimpleNamespace(folder=make_run(tmp_path), recipe=SimpleNamespace(serve=ServeSettings()))
    assert _for_backend(run, folders["torch"]) == folders["torch"]
    run.recipe.serve = ServeSettings(backend="onnx")
    assert _for_backend(run, folders["onnx"]) == folders["onnx"]
    exported = _for_backend(run, folders["torch"])
    written = (exported / "model.onnx").stat().st_mtime_ns
    assert exported == tmp_path / "onnx" / "model" and model_hash(exported) == model_hash(folders["torch"])
    assert _for_backend(run, folders["torch"]) == exported
    assert (exported / "model.onnx").stat().st_mtime_ns == written  # not again
