"""`tdro run --dry-run`: what it counts is right, what it does not know it says, and it leaves nothing behind."""

from __future__ import annotations

import copy
import gzip
import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_export import make_model

from tdro_ray.__main__ import main
from tdro_ray.config import LoraSettings, ModelSettings, TinyModel, TrainSettings
from tdro_ray.data.count import count_rows
from tdro_ray.data.sources import discover
from tdro_ray.dryrun import estimate_flops, task_rows
from tdro_ray.errors import CheckpointError
from tdro_ray.model.shapes import ModelShapes, model_shapes
from tdro_ray.recipe import load_recipe, recipe_names
from tdro_ray.train.memory import estimate, read_shape, shape_of

LINE = json.dumps({"query": "a query", "positive": "a passage " * 20}) + "\n"


@pytest.fixture
def dry(tmp_path, monkeypatch, capsys):
    """Dry-run a recipe in an empty folder; return what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TDRO_RUNS", str(tmp_path / "runs"))

    def run(*arguments: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert main(["run", *map(str, arguments), "--dry-run"]) == 0
        assert sorted(tmp_path.rglob("*")) == before
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_are_shown_within_seconds(dry, name: str) -> None:
    began = time.monotonic()
    shown = dry(name)
    assert time.monotonic() - began < 5
    for word in ("ingest", "reference", "optimize", "finetune-current", "Model", "Memory", "Disk", "Time", "to do"):
        assert word in shown
    assert "not yet ingested" in shown


def test_rows_of_sources_are_counted(dry, tmp_path: Path) -> None:
    for name, rows in (("a", 30), ("b", 50)):
        (tmp_path / "data" / name).mkdir(parents=True)
        with gzip.open(tmp_path / "data" / name / "train.jsonl.gz", "wt") as file:
            file.write(LINE * rows)
    settings = ("reference.steps=10", "reference.batch_size=8", "optimize.steps=5", "optimize.batch_size=8")
    shown = dry("real", *(part for s in ("data.sources=data", *settings) for part in ("--set", s)))
    table = {line.split()[0]: line.split() for line in shown.splitlines() if line}
    assert table["a"] == ["a", "30", "40", "20"] and table["b"] == ["b", "50", "40", "20"]
    assert table["reference"][:5] == ["reference", "to", "do", "10", "80"]
    assert "rows (before ingest)" in shown
    assert "an assumed 30 GFLOP/s per worker" in shown and "≤: texts are not ingested yet" in shown


def test_rows_are_those_after_cleaning_where_it_has_run() -> None:
    manifests = {
        "ingest": {"summary": {"tasks": {"b": {"rows": 50}, "a": {"rows": 30}}}},
        "clean": {"summary": {"tasks": {"a": {"rows": 28, "dropped": 2}, "b": {"rows": 50, "dropped": 0}}}},
    }
    run = SimpleNamespace(current={"ingest": True, "clean": False}, manifest=manifests.__getitem__)
    assert task_rows(run) == ({"a": 30, "b": 50}, "before cleaning")
    run.current["clean"] = True
    assert task_rows(run) == ({"a": 28, "b": 50}, "")


def test_the_time_follows_an_earlier_run(dry, tmp_path: Path) -> None:
    stage = tmp_path / "runs" / "real" / "stages" / "reference"
    stage.mkdir(parents=True)
    records = [{"step": s, "tokens_per_s": r, "step_s": 2.0} for s, r in ((10, 1.0), (20, 500.0), (30, 500.0))]
    (stage / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    from tdro_ray.recipe import load_recipe

    config = load_recipe("real").model_dump(mode="json")
    (stage.parents[1] / "config.json").write_text(json.dumps(config))
    shown = dry("real", "--set", "reference.steps=60")
    line = next(ln for ln in shown.splitlines() if ln.startswith("reference"))
    assert line.split() == [
        "reference",
        "to",
        "do",
        "60",
        "2,880",
        "60.0",
        "k",
        "2",
        "min",
    ]  # 60 x 2 s, 1,000 tokens each
    other = dry("real", "--set", "reference.batch_size=8")  # drew other batches: its figures do not count
    assert "≤" in next(ln for ln in other.splitlines() if ln.startswith("reference"))


def test_a_model_that_cannot_be_reached_is_unknown_with_the_reason(dry) -> None:
    shown = dry("real", "--set", "model.name=no-one/no-model")
    assert "parameters unknown, no-one/no-model is not in the Hub cache" in shown and "Memory   unknown" in shown
    shown = dry("real", "--set", "data.sources=nowhere")
    assert "Tasks: unknown, not yet ingested" in shown and "Source 'nowhere' does not exist" in shown


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst"])
@pytest.mark.parametrize("rows", [300, 40_000])
def test_lines_are_counted_or_estimated(tmp_path: Path, ending: str, rows: int) -> None:
    import random

    import zstandard

    chance = random.Random(0)  # random words: a text of repeats compresses without limit
    text = "".join(json.dumps({"query": "q", "positive": hex(chance.getrandbits(400))}) + "\n" for _ in range(rows))
    raw = text.encode()
    packed = {"jsonl": raw, "jsonl.gz": gzip.compress(raw), "jsonl.zst": zstandard.compress(raw)}[ending]
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / f"train.{ending}").write_bytes(packed)
    found, exact = count_rows(discover([str(tmp_path / "task")])[0])
    assert exact == (rows == 300)
    assert found == pytest.approx(rows, rel=0 if exact else 0.25)


def test_parquet_and_beir_rows(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for folder in ("p", "b/qrels"):
        (tmp_path / folder).mkdir(parents=True)
    pq.write_table(pa.table({"query": ["a"] * 7, "positive": ["b"] * 7}), tmp_path / "p" / "train.parquet")
    (tmp_path / "b" / "corpus.jsonl").write_text("")
    (tmp_path / "b" / "queries.jsonl").write_text("")
    (tmp_path / "b" / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + "q\td\t1\n" * 5)
    found = {t.name: count_rows(t) for t in discover([str(tmp_path)])}
    assert found == {"p": (7, True), "b": (5, False)}


def test_shapes_are_those_of_the_model_however_they_are_found(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    from tdro_ray.model.encoder import load_backbone

    tiny = TinyModel(hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24, vocab_size=400)
    folder = make_model(tmp_path / "model")
    model = load_backbone(folder)
    count = sum(p.numel() for p in model.parameters())
    vocabulary = model.config.vocab_size
    ours = model_shapes(ModelSettings(tiny=tiny.model_copy(update={"vocab_size": vocabulary})))
    of_folder = model_shapes(ModelSettings(name=str(folder)))
    (folder / "model.safetensors").unlink()
    of_config = model_shapes(ModelSettings(name=str(folder)))
    embedded = vocabulary * 16
    for found in (ours, of_folder, of_config):
        assert (found.parameters, found.body, found.layers, found.hidden) == (count, count - embedded, 2, 16)
    for targets in (None, ("q_proj", "down_proj")):
        lora = LoraSettings(r=4, targets=targets)
        adapted = get_peft_model(
            copy.deepcopy(model), LoraConfig(r=4, target_modules=list(targets or []) or "all-linear")
        )
        assert ours.trainable(lora) == of_folder.trainable(lora) == adapted.get_nb_trainable_parameters()[0]
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="makes no model"):
        model_shapes(ModelSettings(name=str(folder)))


def test_time_follows_the_settings() -> None:
    shapes = model_shapes(ModelSettings())
    settings = TrainSettings()
    per_token = {  # forward + backward, checkpointing, GradCache's first pass, frozen weights
        (False, False, 10): 6,
        (True, False, 10): 8,
        (False, False, 10**6): 8,
        (True, True, 10**6): 8,
    }
    for (checkpointing, lora, tokens), times in per_token.items():
        model = ModelSettings(gradient_checkpointing=checkpointing, lora=LoraSettings() if lora else None)
        assert estimate_flops(shapes, settings, model, tokens) == times * shapes.body


def qwen3_8b() -> ModelShapes:
    """Shapes of the body of Qwen3 8 B."""
    hidden, wide, narrow, layers = 4096, 12_288, 1024, 36
    matrices = {
        "q_proj": (hidden, hidden), "k_proj": (narrow, hidden), "v_proj": (narrow, hidden), "o_proj": (hidden, hidden),
        "gate_proj": (wide, hidden), "up_proj": (wide, hidden), "down_proj": (hidden, wide),
    }  # fmt: skip
    body = {f"layers.{n}.{name}.weight": shape for n in range(layers) for name, shape in matrices.items()}
    return ModelShapes({"embed_tokens.weight": (151_936, hidden), **body}, layers, hidden)


def test_the_8b_recipe_takes_the_backend_that_fits_and_moves_least() -> None:
    recipe = load_recipe("lora-8b")
    shape = shape_of(qwen3_8b(), recipe.model.lora)
    assert shape.block == pytest.approx(193e6, rel=0.01) and shape.intermediate == 12_288

    def need(backend: str) -> float:
        scale = recipe.scale.model_copy(update={"backend": backend})
        stages = (recipe.reference, recipe.optimize, recipe.finetune)
        return max(sum(estimate(shape, recipe.model, s, scale).values()) for s in stages)

    assert recipe.scale.backend == "ddp"  # the only one that gathers no weights
    assert need("ddp") == pytest.approx(33e9, rel=0.02) and need("ddp") < 0.9 * 80e9
    assert need("fsdp") == pytest.approx(21e9, rel=0.02) == need("zero3")


def test_the_memory_shown_is_what_training_checks(dry, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    lora = LoraSettings(r=4)
    for model in (None, lora):
        found = shape_of(model_shapes(ModelSettings(name=str(folder))), model)
        assert found == read_shape(folder, model)
    shown = dry("real", "--set", f"model.name={folder}", "--set", "scale.num_workers=[1, 2]")
    recipe = load_recipe("real", (f"model.name={folder}", "scale.num_workers=[1, 2]"))
    shape = shape_of(model_shapes(recipe.model), None)
    most = max(
        sum(estimate(shape, recipe.model, s, recipe.scale).values())
        for s in (recipe.reference, recipe.optimize, recipe.finetune)
    )
    assert f"about {most / 1e9:,.1f} GB per worker" in shown and "(1 to 2 CPU workers, ddp: weights " in shown
