"""An exported model gives the vectors that were trained, through every library that loads it, in a fresh process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tdro_ray.config import ModelSettings, Recipe, TinyModel
from tdro_ray.dro.files import WeightFile, write_weights
from tdro_ray.errors import CheckpointError, ConfigError
from tdro_ray.evaluate.benchmark import summarise
from tdro_ray.model import export as export_module
from tdro_ray.model.build import build_base
from tdro_ray.model.encoder import Encoder
from tdro_ray.model.export import append_end, export, write_tokenizer
from tdro_ray.model.exported import SAMPLES
from tdro_ray.model.tokenize import TextTokenizer, read_spec
from tdro_ray.types import RetrieverSpec

PROMPTS = {"duplicates": "Find a duplicate", "questions": "Answer the question"}


def make_model(folder: Path, **spec: Any) -> Path:
    tiny = TinyModel(hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24, vocab_size=400)
    lengths = {"query_length": 24, "passage_length": 48}
    build_base(ModelSettings(tiny=tiny), RetrieverSpec(**{**lengths, **spec}), iter(SAMPLES), folder, seed=1)
    return folder


def make_bert(folder: Path) -> Path:
    """A BERT whose tokenizer ends every text itself, imported as a base model."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "##b", "##c", "date", "fox", "dog", "the", "quick", "8601"]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder / "bert")
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    BertModel(config).save_pretrained(folder / "bert")
    settings = ModelSettings(name=str(folder / "bert"), pooling="cls")
    build_base(settings, RetrieverSpec(pooling="cls", query_length=16, passage_length=32), iter(()), folder / "base", 1)
    return folder / "base"


def make_run(folder: Path) -> Path:
    recipe = Recipe.model_validate({"name": "small", "data": {"sources": ["environment"]}})
    write_json(folder / "config.json", recipe.model_dump(mode="json"))
    tasks = {
        "questions": {"rows": 900, "language": "en", "licence": "CC BY 4.0", "description": "question | answer"},
        "duplicates": {"rows": 100, "language": "de", "licence": "", "description": "two of a kind"},
    }
    write_json(folder / "stages" / "ingest" / "manifest.json", {"summary": {"tasks": tasks}})
    sizes = {"duplicates": 100, "questions": 900}
    learned = WeightFile(
        {"duplicates": 0.25, "questions": 0.75}, sizes, {"settings": {"measure": "ratio", "eta": 0.05}}
    )
    write_weights(folder / "weights" / "current.json", learned)
    for model, score in {"uniform": 0.4, "current": 0.5}.items():
        metrics = {task: {"ndcg@10": score, "recall@100": 0.9} for task in tasks}
        write_json(folder / "eval" / f"{model}.json", summarise(metrics))
    return folder


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def cosines(a_ND: np.ndarray, b_ND: np.ndarray) -> np.ndarray:
    return (a_ND * b_ND).sum(1) / np.linalg.norm(a_ND, axis=1) / np.linalg.norm(b_ND, axis=1)


def test_a_decoder_is_the_same_through_our_encoder_and_sentence_transformers(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = make_model(tmp_path / "model", task_prompts=PROMPTS, symmetric_tasks=("duplicates",))
    out = export(model, tmp_path / "out", make_run(tmp_path / "run"), "current")
    assert out == tmp_path / "out" and [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    original, ours = Encoder.load(model), Encoder.load(out)
    assert original.spec.append_eos and not ours.spec.append_eos
    for kind in ("query", "passage"):
        for task in ("", *PROMPTS):
            given = original.tokenizer.encode(SAMPLES, kind, task), ours.tokenizer.encode(SAMPLES, kind, task)
            assert given[0] == given[1]
    assert {len(ids) for ids in ours.tokenizer.encode(SAMPLES, "passage")} >= {48, 2}

    theirs = SentenceTransformer(str(out), device="cpu", local_files_only=True)
    assert theirs.max_seq_length == 48
    assert theirs.prompts["questions"] == "Instruct: Answer the question\nQuery: "
    assert cosines(theirs.encode(list(SAMPLES)), original.encode(SAMPLES, "passage")).min() > 0.9999
    asked = ["a", "date"]
    found = theirs.encode(asked, prompt_name="questions")
    assert cosines(found, original.encode(asked, "query", "questions")).min() > 0.9999
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)

    card = (out / "README.md").read_text(encoding="utf-8")
    facts = yaml.safe_load(card.split("---\n")[1])
    assert facts["language"] == ["de", "en"] and facts["library_name"] == "sentence-transformers"
    assert "| `questions` | 900 | 75.0% | en | CC BY 4.0 | question \\| answer |" in card
    assert "| `duplicates` | 100 | 25.0% | de | not stated |" in card and "| **mean** | 0.500 | 0.900 | 0.400 |" in card
    assert "eta 0.05" in card and "max_seq_length` 48" in card and "yes (both sides are of one kind)" in card


def test_an_encoder_that_ends_texts_itself_keeps_its_tokenizer(tmp_path: Path) -> None:
    base = make_bert(tmp_path)
    assert not read_spec(base).append_eos
    out = export(base, tmp_path / "out", tmp_path / "no-run", "uniform")  # checked by export in a fresh process
    assert TextTokenizer(out).encode(["a quick fox"], "query") == [[2, 4, 11, 8, 3]]
    assert json.loads((out / "1_Pooling" / "config.json").read_text())["pooling_mode_cls_token"] is True
    assert "Not evaluated yet" in (out / "README.md").read_text()


def test_the_card_shows_code_that_runs(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", pooling="mean", task_prompts=PROMPTS, query_length=96, passage_length=96)
    out = export(model, tmp_path / "out", make_run(tmp_path / "run"), "current")
    blocks = (out / "README.md").read_text(encoding="utf-8").split("```python\n")[1:]
    found: dict[str, Any] = {}
    for block in blocks:
        exec(block.partition("```")[0].replace("path/to/this/folder", str(out)), found)
    expected = Encoder.load(model).encode(["parse an ISO 8601 date"], "query", "duplicates")
    assert cosines(found["queries"], expected).min() > 0.9999
    assert cosines(found["vectors"].detach().numpy(), expected).min() > 0.9999


def test_only_a_free_place_or_an_earlier_export_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module, "_check", lambda *_: None)
    model, run = make_model(tmp_path / "model"), tmp_path / "run"
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="no earlier export"):
        export(model, taken, run, "current")
    assert [p.name for p in taken.iterdir()] == ["thesis.tex"]
    with pytest.raises(ConfigError, match="is a file"):
        export(model, taken / "thesis.tex", run, "current")
    for inside in (model, model / "export", tmp_path):
        with pytest.raises(ConfigError, match="lie in each other"):
            export(model, inside, run, "current")
    (tmp_path / "empty").mkdir()
    assert export(model, tmp_path / "empty", run, "current").is_dir()
    (tmp_path / "empty" / "stale.txt").write_text("of the earlier export")
    export(model, tmp_path / "empty", run, "current")
    assert not (tmp_path / "empty" / "stale.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "model", "taken"]


def test_an_export_that_gives_other_vectors_is_refused_and_the_earlier_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = make_model(tmp_path / "model"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(export_module, "_check", lambda *_: None)
        export(model, out, tmp_path / "run", "current")
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    monkeypatch.setitem(export_module.POOLING_FLAGS, "last", "max_tokens")
    with pytest.raises(CheckpointError, match="other vectors through sentence_transformers: cosine"):
        export(model, out, tmp_path / "run", "current")
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize("start", [False, True])
def test_an_end_comes_behind_what_the_tokenizer_adds_already(start: bool, chained: bool) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "x": 2, "y": 3}, unk_token="x"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    template = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B:1", special_tokens=[("<s>", 0)])
    steps = [processors.ByteLevel()] * chained + [template] * start
    if steps:
        tokenizer.post_processor = processors.Sequence(steps) if chained else steps[0]
    tokenizer = append_end(tokenizer, "</s>", 1)
    first = [0] * start
    assert tokenizer.encode("x y").ids == [*first, 2, 3, 1]
    assert tokenizer.encode("x", "y").ids == [*first, 2, *first, 3, 1]
    assert tokenizer.encode("").ids == [*first, 1]
    tokenizer.enable_truncation(4)
    assert tokenizer.encode("x y y y").ids == [*first, 2, 3, *[3] * (not start), 1]


def test_an_end_token_that_the_tokenizer_lacks_is_named(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    with pytest.raises(CheckpointError, match="no token with the id 9999"):
        write_tokenizer(model, RetrieverSpec(eos_token_id=9999), tmp_path)
