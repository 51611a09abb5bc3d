"""A task's own maximum lengths: from its files or the recipe into the model's spec, and so into every token id made."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from pydantic import ValidationError
from training import tiny_base

from tdro_ray.config import ModelSettings, Recipe
from tdro_ray.data import sources
from tdro_ray.data.collate import BatchRecipe, Collator, versions_of
from tdro_ray.data.collection import Collection, CollectionStore
from tdro_ray.data.count import sample_tokens
from tdro_ray.data.formats import read
from tdro_ray.data.ingest import _overridden, _source_key
from tdro_ray.data.parsed import parsed_table
from tdro_ray.data.plan import Plan
from tdro_ray.data.writer import TaskWriter, WriteSettings
from tdro_ray.errors import DataError
from tdro_ray.model.encoder import Encoder
from tdro_ray.model.tokenize import TextTokenizer, read_spec
from tdro_ray.stages import training
from tdro_ray.types import RetrieverSpec, TaskInfo

LONG = "alpha beta gamma delta parse read write file date time " * 20


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lengths = {"short": (6, 9), "too long": (99, 99), "queries": (5, 32)}
    return tiny_base(tmp_path_factory.mktemp("base"), task_lengths=lengths, task_prompts={"short": "find"})


def test_a_text_is_cut_at_its_task_length_and_ends_in_eos(base: Path) -> None:
    tokenizer = TextTokenizer(base)
    assert read_spec(base).task_lengths == {"short": (6, 9), "too long": (99, 99), "queries": (5, 32)}

    def lengths(kind: str, task: str) -> tuple[int, int]:
        ids = tokenizer.encode([LONG, "a"], kind, task)
        assert all(i[-1] == tokenizer.spec.eos_token_id for i in ids)
        return len(ids[0]), len(ids[1])

    assert [lengths(kind, "")[0] for kind in ("query", "passage")] == [16, 32]
    assert lengths("query", "short") == (6, 6), "its prompt is longer than that"
    assert lengths("passage", "short")[0] == 9 and lengths("passage", "short")[1] < 9
    assert [lengths(kind, "too long")[0] for kind in ("query", "passage")] == [16, 32], "never above the model's"
    assert [lengths(kind, "queries")[0] for kind in ("query", "passage")] == [5, 32]
    whole, cut = tokenizer.encode([LONG], "passage")[0], tokenizer.encode([LONG], "passage", "short")[0]
    assert whole[:8] == cut[:8]


def test_encoder_and_batches_use_it(base: Path, tmp_path: Path) -> None:
    source = tmp_path / "short" / "train.jsonl"
    source.parent.mkdir()
    source.write_text("\n".join(f'["{n} {LONG}", "{n} {LONG}", "negative {n} {LONG}"]' for n in range(8)))
    for name in ("short", "plain"):
        writer = TaskWriter(tmp_path / "store", name, TaskInfo(), "key", None, WriteSettings(0, 0, 1))
        writer.add(parsed_table(read(source)))
        writer.finish()
    store = CollectionStore(tmp_path / "store")
    collections = store.collections()
    plan = Plan([8, 8], None, 1, 4, 0, "stratified")
    batch = Collator(
        BatchRecipe(tmp_path / "store", ("plain", "short"), versions_of(collections), base, plan, 0)
    ).batch(0, 0, 1)
    queries, passages = batch.length_S[:4], batch.length_S[4:]
    assert sorted(queries.tolist()) == [6, 6, 16, 16] and sorted(passages.tolist()) == [9, 9, 32, 32]
    assert set(queries[batch.task_B == 1]) == {6}
    encoder = Encoder.load(base)
    (vector_D,) = encoder.encode([LONG], "passage", "short")
    (same_D,) = encoder.embed_ids([[*encoder.tokenizer.encode([LONG], "passage")[0][:8], encoder.spec.eos_token_id]])
    assert np.allclose(vector_D, same_D, atol=1e-6)


def test_from_the_task_file_and_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "train.jsonl").write_text('["q", "p"]')
    (tmp_path / "a" / "task.yaml").write_text("query_length: 32\npassage_length: 64\n")
    (task,) = sources.discover([str(tmp_path / "a")])
    assert task.info.lengths(128, 512) == (32, 64) and task.info.lengths(16, 512) == (16, 64)
    recipe = Recipe.model_validate({"data": {"tasks": {"a": {"query_length": 8}}}})
    assert _overridden(recipe, "a", task.info).lengths(128, 512) == (8, 64)
    for bad in ("query_length: 3", "query_length: long", "passage_length: true"):
        (tmp_path / "a" / "task.yaml").write_text(bad)
        with pytest.raises(DataError, match=r"task.yaml: field '(query|passage)_length' must be"):
            sources.discover([str(tmp_path / "a")])
    with pytest.raises(ValidationError, match="greater than or equal to 4"):
        Recipe.model_validate({"data": {"tasks": {"a": {"passage_length": 2}}}})


def test_a_task_of_another_length_is_read_again() -> None:
    keys = {_source_key(Recipe(), "print", TaskInfo(query_length=length)) for length in (None, 8, 9)}
    assert len(keys) == 3 and _source_key(Recipe(), "print", TaskInfo()) in keys


def test_the_spec_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    infos = {"a": TaskInfo(), "b": TaskInfo(passage_length=64), "c": TaskInfo(query_length=999)}
    found = [SimpleNamespace(name=n, manifest=SimpleNamespace(info=i)) for n, i in infos.items()]
    monkeypatch.setattr(training, "collections", lambda run: found)
    spec = training.retriever_spec(SimpleNamespace(recipe=Recipe()))
    assert spec.task_lengths == {"b": (128, 64), "c": (128, 512)}
    assert spec.length("passage", "b") == 64 and spec.length("query", "c") == 128 and spec.length("query") == 128
    assert RetrieverSpec().task_lengths == {}


def test_tokens_are_estimated_by_it(tmp_path: Path) -> None:
    source = tmp_path / "short.jsonl"
    source.write_text("\n".join(f'["{n} {LONG}", "{n} {LONG}"]' for n in range(8)))
    writer = TaskWriter(
        tmp_path / "store", "short", TaskInfo(query_length=7, passage_length=11), "key", None, WriteSettings(0, 0, 1)
    )
    writer.add(parsed_table(read(source)))
    writer.finish()
    assert sample_tokens([Collection(tmp_path / "store" / "short")], ModelSettings(), tmp_path) == (7.0, 11.0)
