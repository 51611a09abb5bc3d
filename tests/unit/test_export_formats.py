"""An adapter alone and an ONNX graph give the vectors of the trained model; whatever does not is not left behind."""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import logging
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from test_export import PROMPTS, cosines, make_bert, make_model, make_run
from training import TASKS, global_batch

from tdro_ray.config import LoraSettings, ModelSettings, TrainSettings
from tdro_ray.errors import CheckpointError, ConfigError
from tdro_ray.index.versions import model_hash
from tdro_ray.model import export as export_module
from tdro_ray.model.encoder import Encoder
from tdro_ray.model.export import export
from tdro_ray.model.load import load_encoder
from tdro_ray.model.onnx_encoder import OnnxEncoder
from tdro_ray.train.context import LocalContext
from tdro_ray.train.loop import TrainJob, train

TEXTS = [  # real text, from one word to many paragraphs
    "date",
    "parse an ISO 8601 date",
    "the quick brown fox jumps over the dog",
    *(str(f.__doc__) for f in (csv.reader, json.loads, textwrap.wrap, logging.getLogger, argparse.ArgumentParser)),
    str(textwrap.dedent.__doc__) * 4,
    str(logging.__doc__),
]


def lora_model(folder: Path, dtype: str = "float32") -> Path:
    """Train a LoRA model for a few steps and return its model folder; its base lies where a run keeps it."""
    base = make_model(folder / "run" / "stages" / "model" / "base", task_prompts=PROMPTS)
    settings = TrainSettings(steps=6, batch_size=8, temperature=0.1, learning_rate=0.2, warmup_steps=0)
    model = ModelSettings(lora=LoraSettings(r=4, dropout=0.1), dtype=dtype)
    context = LocalContext(lambda start: (global_batch(8, 3, s % 3, step=s) for s in range(start, 6)), folder / "kept")
    train(TrainJob("key", base, folder / "log", settings, model, TASKS, seed=5), context)
    latest = context.latest_checkpoint()
    assert latest is not None
    return latest / "model"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_on_its_base_is_the_trained_model(tmp_path: Path, dtype: str) -> None:
    from peft import AutoPeftModelForFeatureExtraction, PeftConfig

    model, run = lora_model(tmp_path, dtype), make_run(tmp_path / "run")
    base = run / "stages" / "model" / "base"
    trained, untrained = Encoder.load(model), Encoder.load(base)
    assert cosines(trained.encode(TEXTS, "passage"), untrained.encode(TEXTS, "passage")).min() < 0.99  # it learned
    out = export(model, tmp_path / "out", run, "current", "lora")
    names = {p.name for p in out.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tdro.json", "README.md"} <= names
    assert not [n for n in names if n.startswith("model")]
    assert PeftConfig.from_pretrained(str(out)).base_model_name_or_path == str(base)
    AutoPeftModelForFeatureExtraction.from_pretrained(str(out))
    found: dict[str, Any] = {}
    card = (out / "README.md").read_text(encoding="utf-8")
    exec(card.split("```python\n")[1].partition("```")[0].replace("path/to/this/folder", str(out)), found)
    expected = trained.encode(["parse an ISO 8601 date"], "query", "duplicates")
    assert cosines(found["vectors"].detach().numpy(), expected).min() > (0.9999 if dtype == "float32" else 0.999)
    facts = yaml.safe_load(card.split("---\n")[1])
    assert facts["library_name"] == "peft" and "base_model" not in facts  # a folder is no model of the Hub
    export(model, out, run, "current")  # an adapter export may be replaced by a merged one
    assert (out / "modules.json").exists() and not (out / "adapter_config.json").exists()


def test_a_hub_model_is_named_as_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module, "_check", lambda *_: None)
    model, run = lora_model(tmp_path), make_run(tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["model"] |= {"name": "some/model-8b", "lora": {"r": 4, "alpha": 32}}
    (run / "config.json").write_text(json.dumps(config))
    out = export(model, tmp_path / "out", run, "current", "lora")
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/model-8b"
    card = (out / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "some/model-8b"
    assert 'AutoModel.from_pretrained("some/model-8b")' in card and "LoRA, r 4, alpha 32 |" in card


def test_a_model_trained_in_full_has_no_adapter_to_export(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"no LoRA adapter: the model was trained in full.*--format hf"):
        export(model, tmp_path / "out", tmp_path / "run", "current", "lora")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_another_adapter_is_refused_and_not_left_behind(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model, run = lora_model(tmp_path), make_run(tmp_path / "run")
    path = model / "adapter" / "adapter_model.safetensors"
    save_file({k: v * 2 for k, v in load_file(path).items()}, path)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=r"other vectors through peft: cosine 0\.\d+ for '.*\(passage|query"):
        export(model, tmp_path / "out", run, "current", "lora")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def decoder(folder: Path) -> Path:
    lengths = {"query_length": 48, "passage_length": 200}
    return make_model(folder / "model", task_prompts=PROMPTS, symmetric_tasks=("duplicates",), **lengths)


def mean_bert(folder: Path) -> Path:
    """A bidirectional encoder with mean pooling: padding that leaks would change its vectors."""
    from dataclasses import replace

    from tdro_ray.model.tokenize import read_spec, write_spec

    base = make_bert(folder)
    write_spec(base, replace(read_spec(base), pooling="mean"))
    return base


@pytest.mark.parametrize("make", [decoder, mean_bert])
def test_a_graph_gives_the_vectors_of_torch_whatever_the_batch(tmp_path: Path, make: Any) -> None:
    model = make(tmp_path)
    out = export(model, tmp_path / "out", make_run(tmp_path / "run"), "current", "onnx", model_hash(model))
    ours, theirs = Encoder.load(model), load_encoder(out)
    assert isinstance(theirs, OnnxEncoder) and theirs.dim == ours.dim and theirs.spec.pooling == ours.spec.pooling
    lengths = {len(s) for s in theirs.tokenizer.encode(TEXTS, "passage")}
    assert len(lengths) >= 4 and max(lengths) == ours.spec.passage_length
    for kind, task in (("passage", ""), ("query", ""), ("query", "duplicates"), ("passage", "duplicates")):
        expected = ours.encode(TEXTS, kind, task)
        for budget in (16384, 64):  # one batch, and several of different lengths
            found = theirs.encode(TEXTS, kind, task, budget)
            assert found.dtype == np.float32 and cosines(found, expected).min() >= 0.9999
            np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
        alone = np.concatenate([theirs.encode([text], kind, task) for text in TEXTS])
        assert cosines(alone, expected).min() >= 0.9999
    assert theirs.encode([], "query").shape == (0, ours.dim)
    assert model_hash(out) == model_hash(model)  # it may serve the index of the original
    with pytest.raises(ConfigError, match="runs on the CPU; 'cuda' was asked for"):
        load_encoder(out, "cuda")
    served = asyncio.run(embed_served(out))
    assert cosines(served, ours.encode(TEXTS, "passage")).min() >= 0.9999


async def embed_served(folder: Path) -> np.ndarray:
    from serve.engine import Engine

    engine = Engine.open(folder)
    try:
        return (await engine.embed(TEXTS, "passage"))[0]
    finally:
        engine.close()


def test_the_card_of_a_graph_shows_code_that_runs(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", pooling="mean", task_prompts=PROMPTS, query_length=96, passage_length=96)
    out = export(model, tmp_path / "out", make_run(tmp_path / "run"), "current", "onnx")
    found: dict[str, Any] = {}
    card = (out / "README.md").read_text(encoding="utf-8")
    for block in card.split("```python\n")[1:]:
        exec(block.partition("```")[0].replace("path/to/this/folder", str(out)), found)
    expected = Encoder.load(model).encode(["parse an ISO 8601 date"], "query", "duplicates")
    assert cosines(found["queries"], expected).min() > 0.9999 and cosines(found["vectors"], expected).min() > 0.9999
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "onnxruntime"
    assert model_hash(out) != model_hash(model)  # made without naming its origin
    (out / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(CheckpointError, match=r"model\.onnx cannot be read.*Export the model again"):
        load_encoder(out)


def test_a_graph_that_gives_other_vectors_is_refused_and_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tdro_ray.model import pooling

    model = make_model(tmp_path / "model")
    load = Encoder.load

    def as_trained(*given: Any) -> Encoder:
        monkeypatch.undo()  # the graph is written with another pooling than the model is read with
        return load(*given)

    monkeypatch.setattr(export_module.Encoder, "load", as_trained)
    monkeypatch.setitem(pooling.POOLING, "last", pooling.mean)
    with pytest.raises(CheckpointError, match=r"other vectors through onnx: cosine .* Nothing was written"):
        export(model, tmp_path / "out", tmp_path / "run", "current", "onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_missing_libraries_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    model = make_model(tmp_path / "model")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"needs onnxscript: .*tdro-ray\[onnx\]"):
        export(model, tmp_path / "out", tmp_path / "run", "current", "onnx")
    (tmp_path / "graph").mkdir()
    (tmp_path / "graph" / "model.onnx").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"onnxruntime is not installed: pip install 'tdro-ray\[onnx\]'"):
        load_encoder(tmp_path / "graph")
