"""Near duplicates: equality with comparing all pairs, every script, and which row of a repeated text stays."""

import numpy as np
import pytest

from tdro_ray.data.near import Finding, Texts, band_keys, candidates, findings, shingles, similarity

WORDS = [a + b + c for a in "bdfgkl" for b in "aeiou" for c in "mnrst"]


def test_similarity_in_every_script():
    assert similarity("What is  a CAT", "what is a cat") == 1.0
    assert similarity("", "") == 1.0 and shingles("猫") == {"猫"}
    assert similarity("日本の首都はどこですか", "日本の首都はどこですか？") == pytest.approx(9 / 10)
    assert similarity("日本の首都はどこですか", "フランスの人口は何人ですか") < 0.2
    assert similarity("ｆｕｌｌ width", "full width") == 1.0


def test_the_pairs_are_those_of_comparing_all_with_all():
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 20)) for _ in range(60)]
    texts += [text.replace("a", "e", 1) for text in texts[:30]]
    texts += ["".join(chr(0x4E00 + int(c)) for c in rng.integers(0, 3000, 40)) for _ in range(10)]
    texts += [texts[90] + "吗", texts[91][1:]]
    exact = {
        (i, j) for i in range(len(texts)) for j in range(i + 1, len(texts)) if similarity(texts[i], texts[j]) >= 0.9
    }
    proposed = candidates(band_keys(texts))
    assert len(exact) >= 30 and (90, 100) in exact
    assert {tuple(p) for p in proposed.tolist() if similarity(texts[p[0]], texts[p[1]]) >= 0.9} == exact
    assert len(proposed) < 4 * len(exact), "bands propose few others"


def test_a_bucket_of_many_is_not_compared_all_with_all():
    keys = np.zeros((1000, 2), np.uint32)
    keys[:, 1] = np.arange(1000)
    pairs = candidates(keys)
    assert len(pairs) < 1000 * 32 and set(pairs[:, 1].tolist()) == set(range(1, 1000))


def test_nothing_to_compare():
    assert len(candidates(band_keys([]))) == 0


def made() -> Texts:
    # small: 0 1 2; large: 0 3 4 5 5; text 2 is near 1, text 3 near test query 6, text 4 is a test query
    texts = Texts(
        {"large": np.array([0, 3, 4, 5, 5, 7]), "small": np.array([0, 1, 2])}, {4: ("t", "q4"), 6: ("t", "q6")}
    )
    texts.link([(1, 2, 0.95), (3, 6, 0.92), (7, 5, 0.9)])
    return texts


def test_findings_and_which_row_stays():
    found = findings(made(), {"contaminated", "near_duplicates", "across_tasks"})
    assert found == [
        Finding("small", 2, "near_duplicates", ("small", 1), 0.95),
        Finding("large", 0, "across_tasks", ("small", 0), 1.0),
        Finding("large", 1, "contaminated", ("t", "q6"), 0.92),
        Finding("large", 2, "contaminated", ("t", "q4"), 1.0),
        Finding("large", 5, "near_duplicates", ("large", 3), 0.9),
    ], "rows 3 and 4 of `large` have one query: its several positives"


def test_a_dropped_row_drops_no_other():
    texts = Texts({"a": np.array([0, 1, 2])}, {})
    texts.link([(0, 1, 0.9), (1, 2, 0.9)])  # a chain: 2 is near 1 alone
    assert [f.row for f in findings(texts, {"near_duplicates"})] == [1]
    assert [f.row for f in findings(texts, set())] == [1, 2], "reported only, row 1 stays and 2 repeats it"
