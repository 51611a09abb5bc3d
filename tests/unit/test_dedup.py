"""Equal texts have equal keys; what is left out of a row and out of its negatives."""

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdro_ray.data.bm25 import BM25, Tokenizer
from tdro_ray.data.dedup import normalise, passage_key, row_key, text_key
from tdro_ray.data.negatives import PassageClasses, choose, shared_positives


def test_normalise() -> None:
    assert normalise("  What\tIS  this ") == "what is this"
    assert normalise("ＡＢＣ Straße\u3000x") == "abc strasse x"
    assert text_key("A b") == text_key("a  B") != text_key("ab")


@given(st.text())
def test_normalise_twice_is_once(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


def test_passage_key_keeps_title_and_text_apart() -> None:
    assert passage_key("a", "b") != passage_key("", "ab") and passage_key("", "A") != passage_key("", "a")


def test_row_key_does_not_depend_on_order() -> None:
    a, b = passage_key("", "a"), passage_key("", "b")
    assert row_key(text_key("q"), [a, b]) == row_key(text_key("Q"), [b, a, a]) != row_key(text_key("q"), [a])


def test_passage_classes_join_twins() -> None:
    classes = PassageClasses.of([["a b", "c"], ["A  b", "d", "C"]])
    assert classes.class_P.tolist() == [0, 1, 0, 3, 1]
    assert classes.by_key[text_key("a B")] == 0


def test_shared_positives() -> None:
    keys = np.asarray([b"x", b"y", b"x", b"z"])
    assert shared_positives(keys, [[1], [2], [5, 3], [4]]) == {0: [1, 3, 5], 2: [1, 3, 5]}


@given(st.integers(1, 40), st.data())
def test_chosen_negatives_are_distinct_and_never_forbidden(num_passages: int, data: st.DataObject) -> None:
    class_P = np.asarray([data.draw(st.integers(0, p)) for p in range(num_passages)])
    number = st.integers(0, num_passages - 1)
    forbidden = {int(class_P[p]) for p in data.draw(st.lists(number, min_size=1, max_size=3))}
    given_, found = data.draw(st.lists(number, max_size=10)), data.draw(st.lists(number, unique=True, max_size=20))
    wanted = data.draw(st.integers(1, 12))
    chosen = choose(given_, found, forbidden, class_P, wanted, Random(1))
    classes = [int(class_P[n]) for n in chosen.negatives]
    assert len(set(classes)) == len(classes) and not forbidden & set(classes)
    assert chosen.given + chosen.mined + chosen.random == len(classes)
    available = len(set(class_P.tolist()) - forbidden)
    assert len(classes) >= min(wanted, available), "filled as far as the task has passages"
    assert chosen == choose(given_, found, forbidden, class_P, wanted, Random(1))


def test_choose_takes_given_first_then_mined() -> None:
    chosen = choose([9], [1, 2, 3], {2}, np.arange(1000), 5, Random(0))
    assert chosen.negatives[0] == 9 and set(chosen.negatives[1:3]) == {1, 3} and len(chosen.negatives) == 5
    assert (chosen.given, chosen.mined, chosen.random) == (1, 2, 2)
    assert choose([7, 8, 9], [1], {2}, np.arange(1000), 2, Random(0)).negatives == [7, 8, 9]


@pytest.mark.parametrize(
    ("texts", "query", "best"),
    [
        (["the cat sat", "dogs are running fast", "a bird"], "does the dog run?", 1),
        (["東京は日本の首都です", "京都は古い都です"], "日本の首都はどこ", 0),
        (["def parse_iso_date(text)", "def open_file(path)"], "parse a date", 0),
    ],
)
def test_bm25_finds(texts: list[str], query: str, best: int) -> None:
    assert BM25([texts], "en").search([query], [[best]], 2)[0].passages[0] == best


def test_bm25_gives_only_passages_with_a_common_term_in_a_stable_order() -> None:
    index = BM25([["x y", "x y", "z", "x y"]])
    found = index.search(["x", "z", "unknown", ""], [[3], [0, 2], [0], [1]], 2)
    assert [ranked.passages.tolist() for ranked in found] == [[0, 1], [2], [], []]
    assert found[0].positive == found[0].scores[0] == found[0].scores[1] > 0  # equal texts, the third one cut off
    assert [ranked.positive for ranked in found[1:]] == [0, 0, 0]


def test_tokenizer_uses_bigrams_where_there_are_no_spaces() -> None:
    tokenizer = Tokenizer()
    tokenizer(["日本語 ok ไทย"], grow=True)
    assert list(tokenizer.vocabulary) == ["日本", "本語", "ok", "ไท", "ทย"]
