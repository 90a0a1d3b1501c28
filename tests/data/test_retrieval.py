"""Rankings: BM25 against its formula, fusion against its formula, ties by index."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from jora.data.dense import Dense
from jora.data.retrieval import BM25, Fused, best, words
from jora.errors import InputError

TEXTS = ["a b b c", "b c d", "d d d e", "x __init__ y", "b c d", "e f g a a"]


def bm25(query: str) -> np.ndarray:
    """Lucene's formula (k1 = 1.5, b = 0.75), in numpy."""
    texts = [Counter(text.split()) for text in TEXTS]
    sizes = np.array([sum(text.values()) for text in texts])
    scores = np.zeros(len(texts))
    for word in query.split():
        holding = sum(word in text for text in texts)
        idf = math.log(1 + (len(texts) - holding + 0.5) / (holding + 0.5))
        for i, text in enumerate(texts):
            tf = text[word]
            scores[i] += idf * tf / (tf + 1.5 * (1 - 0.75 + 0.75 * sizes[i] / sizes.mean()))
    return scores


@pytest.mark.parametrize("query", ["b d", "a e zzz", "__init__", "d d b"])
def test_bm25_is_its_formula(query: str) -> None:
    np.testing.assert_allclose(BM25(TEXTS).scores(query), bm25(query), rtol=1e-5)
    assert BM25(TEXTS).rank(query, 3) == np.argsort(-bm25(query), kind="stable")[:3].tolist()


def test_ties_and_unknown_words() -> None:
    ranking = BM25(TEXTS).rank("b c", 6)
    assert ranking.index(1) + 1 == ranking.index(4)  # the same text twice: by index
    assert BM25(TEXTS).rank("nothing known", 9) == [0, 1, 2, 3, 4, 5]
    assert BM25(["", "..."]).rank("x", 2) == [0, 1]
    assert words("The __init__ of X-1") == ["the", "__init__", "of", "x", "1"]


class Fixed:
    def __init__(self, order: list[int]) -> None:
        self.order = order

    def rank(self, query: str, k: int) -> list[int]:
        return self.order[:k]


def test_reciprocal_rank_fusion() -> None:
    first, second = [3, 0, 1, 2], [1, 3, 2, 0]
    scores = {d: 1 / (61 + first.index(d)) + 1 / (61 + second.index(d)) for d in range(4)}
    fused = Fused([Fixed(first), Fixed(second)], 4)
    assert fused.rank("q", 4) == sorted(range(4), key=lambda d: -scores[d])
    assert Fused([Fixed([0, 1]), Fixed([1, 0])], 2).rank("q", 2) == [0, 1]
    assert best(np.array([1.0, 3.0, 3.0]), 2) == [1, 2]


def test_dense_retrieval_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(InputError, match=r"pip install 'jora\[dense\]'"):
        Dense(TEXTS, "model")


def test_dense_retrieval_ranks_by_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    class Encoder:  # stands in for a model that would have to be downloaded
        def __init__(self, name: str) -> None:
            assert name == "model"

        def encode_document(self, texts: list[str], **options: object) -> np.ndarray:
            assert options["normalize_embeddings"]
            return np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])

        def encode_query(self, text: str, **options: object) -> np.ndarray:
            assert options["normalize_embeddings"]
            return np.array([0.0, 1.0])

    module = type(sys)("sentence_transformers")
    monkeypatch.setattr(module, "SentenceTransformer", Encoder, raising=False)
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    assert Dense(["a", "b", "c"], "model").rank("q", 2) == [2, 1]


def test_retrieval_does_not_start_jax() -> None:
    code = (
        "import sys; from jora.data.retrieval import BM25; BM25(['a b', 'c']).rank('a', 1); "
        "assert 'jax' not in sys.modules; "
        "import jax, bm25s; jax.config.update('jax_num_cpu_devices', 2); assert len(jax.devices('cpu')) == 2"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
