"""A cross-encoder scores pair by pair what it scores in batches; margins and batches take its scores."""

from pathlib import Path

import numpy as np
import pytest
import torch
from crossencoder import tiny_cross_encoder

from tdro_ray.config import MineSettings, Recipe, mining_settings
from tdro_ray.data.rescore import _within
from tdro_ray.errors import CheckpointError
from tdro_ray.model.cross_encoder import CrossEncoder, check

WORDS = ["red", "green", "blue", "cat", "dog", "bird", "river", "mountain", "ocean", "engine"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cross_encoder(tmp_path_factory.mktemp("cross") / "model", WORDS)


def test_in_batches_as_one_by_one(folder: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    rng = np.random.default_rng(0)
    queries = [" ".join(rng.choice(WORDS, rng.integers(1, 5))) for _ in range(30)]
    passages = [" ".join(rng.choice(WORDS, rng.integers(1, 90))) for _ in range(30)]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = []
    for query, passage in zip(queries, passages):
        given = tokenizer(query, passage, truncation="longest_first", max_length=40, return_tensors="pt")
        with torch.inference_mode():
            expected.append(float(model(**given).logits[0, 0]))
    for budget in (16, 300, 100_000):
        found = CrossEncoder.load(folder, 40).score(queries, passages, budget)
        assert found.dtype == np.float32 and found == pytest.approx(expected, abs=1e-4)
    probabilities = CrossEncoder.load(folder, 40, sigmoid=True).score(queries, passages)
    assert probabilities == pytest.approx(1 / (1 + np.exp(-np.array(expected))), abs=1e-4)
    assert np.std(expected) > 0.01 and len(CrossEncoder.load(folder, 40).score([], [])) == 0


def test_no_longer_than_the_model_reads(folder: Path) -> None:
    encoder = CrossEncoder.load(folder, 512)
    assert encoder.length == 64 and encoder.score(["red"], ["dog " * 500]).shape == (1,)


def test_what_is_no_cross_encoder_is_refused(folder: Path, tmp_path: Path) -> None:
    three = tiny_cross_encoder(tmp_path / "three", WORDS, num_labels=3)
    with pytest.raises(CheckpointError, match=r"has 3 outputs, it must have one.*mine.rescore.model"):
        check(three)
    (tmp_path / "empty").mkdir()
    for name in (tmp_path / "empty", "no/such-model"):
        with pytest.raises(CheckpointError, match=r"Cross-encoder '.*' cannot be loaded from that .*num_labels=1"):
            CrossEncoder.load(name, 64)


def test_margins_are_of_its_scores() -> None:
    records = [{"positives": [0, 1], "given_negatives": [2]}, {"positives": [5], "given_negatives": []}]
    found = [np.array([3, 1, 4, 2]), np.array([6, 7])]
    scores = [{0: 9.0, 1: 4.0, 2: 8.0, 3: 3.9, 4: 3.7}, {5: -1.0, 6: -1.01, 7: -2.0}]
    hits = _within(records, found, scores, MineSettings(margin_relative=0.95))
    assert [h.tolist() for h in hits.passages] == [[4], [7]], "against the positive of the lowest score"
    assert (hits.num_ranked, hits.num_filtered) == (5, 3) and hits.positive_Q.tolist() == [4.0, -1.0]
    hits = _within(records, found, scores, MineSettings(margin_relative=None, margin_absolute=0.05))
    assert [h.tolist() for h in hits.passages] == [[3, 4], [7]]
    assert hits.scores[0] == pytest.approx([3.9, 3.7])


def test_settings_count_only_where_they_have_an_effect() -> None:
    assert "rescore" not in mining_settings(MineSettings()), "negatives mined before stay up to date"
    assert "margin_relative" not in mining_settings(MineSettings())
    recipe = Recipe.model_validate({"mine": {"rescore": {"model": "cross"}}})
    found = mining_settings(recipe.mine)
    assert found["rescore"]["model"] == "cross" and found["margin_relative"] == 0.95 and "model" not in found
