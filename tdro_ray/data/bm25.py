"""BM25 over one task's passages (bm25s), for any language. Knows nothing of Ray or of the store."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

# Scripts written without spaces (or, Korean, with long agglutinated words): indexed as character bigrams.
_DENSE = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_TOKENS = re.compile(rf"[{_DENSE}]+|[^\W_{_DENSE}]+")
_DENSE_START = re.compile(rf"[{_DENSE}]")
STEMMERS = {
    "ar": "arabic", "ca": "catalan", "da": "danish", "de": "german", "el": "greek", "en": "english", "es": "spanish",
    "fi": "finnish", "fr": "french", "hu": "hungarian", "id": "indonesian", "it": "italian", "lt": "lithuanian",
    "nl": "dutch", "no": "norwegian", "pt": "portuguese", "ro": "romanian", "ru": "russian", "sv": "swedish", "tr": "turkish",
}  # fmt: skip
_ENGLISH = frozenset(["the", "of", "and", "to", "in", "is", "a", "that", "for", "with", "on", "what", "how", "are"])


def guess_language(texts: Sequence[str]) -> str:
    """Return "en" where common English words are at least 8 % of all words, else "" (no stemming)."""
    words = [word for text in texts for word in text.lower().split()]
    return "en" if words and sum(word in _ENGLISH for word in words) >= 0.08 * len(words) else ""


class Tokenizer:
    """Texts to term numbers: words (stemmed where the language has a stemmer), bigrams in scripts without spaces."""

    def __init__(self, language: str = "") -> None:
        self.language = language
        self.vocabulary: dict[str, int] = {}  # term -> number
        self._words: dict[str, int] = {}  # word as written, lower case -> number of its stem
        self._stemmer = None

    def __call__(self, texts: Iterable[str], grow: bool) -> list[list[int]]:
        """Term numbers of each text; unknown terms get new numbers where `grow`, and are left out otherwise."""
        return [self._text(text.lower(), grow) for text in texts]

    def _text(self, text: str, grow: bool) -> list[int]:
        numbers: list[int] = []
        for token in _TOKENS.findall(text):
            if _DENSE_START.match(token):
                terms = [token] if len(token) == 1 else [token[i : i + 2] for i in range(len(token) - 1)]
                numbers += [self._number(term, grow) for term in terms]
            else:
                number = self._words.get(token)
                if number is None:
                    number = self._number(self._stem(token), grow)
                    if grow:
                        self._words[token] = number
                numbers.append(number)
        return [n for n in numbers if n >= 0]

    def _number(self, term: str, grow: bool) -> int:
        return self.vocabulary.setdefault(term, len(self.vocabulary)) if grow else self.vocabulary.get(term, -1)

    def _stem(self, word: str) -> str:
        if self.language not in STEMMERS:
            return word
        if self._stemmer is None:
            import Stemmer

            self._stemmer = Stemmer.Stemmer(STEMMERS[self.language])
        return self._stemmer.stemWord(word)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_stemmer": None}


@dataclass(frozen=True)
class Ranked:
    """What BM25 finds for one query, best first."""

    passages: np.ndarray
    scores: np.ndarray
    positive: float  # score of the query's least similar positive; 0 where they share no term


class BM25:
    """An index over passages, numbered as given. Arrays only, so that Ray shares one copy between processes."""

    def __init__(self, batches: Iterable[Sequence[str]], language: str = "") -> None:
        import bm25s

        self.tokenizer = Tokenizer(language)
        terms = [numbers for batch in batches for numbers in self.tokenizer(batch, grow=True)]
        self.num_passages = len(terms)
        self._index = bm25s.BM25()
        vocabulary = self.tokenizer.vocabulary or {"": 0}
        self._index.index((terms, vocabulary), show_progress=False, create_empty_token=False)

    def search(self, queries: Sequence[str], positives: Sequence[Sequence[int]], depth: int) -> list[Ranked]:
        """At most `depth` passages by falling score for each query, only ones that share a term with it.

        Equal scores come in passage order, so that the result does not depend on the sorting library.
        """
        numbers = self.tokenizer(queries, grow=False)
        return [self._search(terms, known, depth) for terms, known in zip(numbers, positives, strict=True)]

    def _search(self, terms: list[int], positives: Sequence[int], depth: int) -> Ranked:
        if not terms:
            return Ranked(np.empty(0, np.int64), np.empty(0, np.float32), 0.0)
        scores = self._index.get_scores_from_ids(terms)
        if depth < len(scores):
            cut = np.partition(scores, len(scores) - depth)[len(scores) - depth]
            found = np.flatnonzero(scores >= max(cut, np.finfo(scores.dtype).tiny))
        else:
            found = np.flatnonzero(scores > 0)
        best = found[np.argsort(-scores[found], kind="stable")][:depth]
        return Ranked(best, scores[best], float(scores[list(positives)].min()))
