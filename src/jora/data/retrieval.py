"""Which texts a question finds: BM25, and the fusion of several rankings (dense ones: `dense.py`)."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float

RRF_CONSTANT = 60  # Cormack, Clarke and Büttcher, "Reciprocal rank fusion", SIGIR 2009


class Retriever(Protocol):
    """Ranks the texts it was made from."""

    def rank(self, query: str, k: int) -> list[int]:
        """Indices of the `k` best texts (all, if there are fewer), the best first; ties by index."""


def best(scores: Float[np.ndarray, " texts"], k: int) -> list[int]:
    """Indices of the `k` highest scores; equal scores in the order of their index."""
    return np.argsort(-scores, kind="stable")[:k].tolist()


def words(text: str) -> list[str]:
    """The terms of a text: lower-case runs of letters, digits and underscores.

    Single letters and common words stay: they name things in technical text, and BM25 weighs them down.
    """
    return re.findall(r"\w+", text.lower())


@contextmanager
def _without_jax() -> Iterator[None]:
    """bm25s runs a jax operation at import, which would start jax's devices (and take a GPU's memory)
    before the mesh is set up; it does without where jax cannot be imported."""
    hidden = {name: sys.modules.get(name) for name in ("jax", "jax.lax")}
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None makes an import fail
    try:
        yield
    finally:
        for name, module in hidden.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def _bm25s() -> Any:
    with _without_jax():
        import bm25s
    return bm25s


class BM25:
    """Lexical retrieval (Robertson et al., TREC-3 1994; Lucene's variant, k1 = 1.5, b = 0.75)."""

    def __init__(self, texts: Sequence[str]) -> None:
        bm25s = _bm25s()
        split = [words(text) for text in texts]
        # The vocabulary in order of appearance: bm25s would take it from a set, whose order varies.
        self.vocabulary: dict[str, int] = {}
        ids = [[self.vocabulary.setdefault(word, len(self.vocabulary)) for word in text] for text in split]
        self.size = len(ids)
        self.index: Any = None
        if self.vocabulary:
            self.index = bm25s.BM25(method="lucene")
            self.index.index((ids, dict(self.vocabulary)), show_progress=False)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the index for `load`: plain arrays (.npy without pickle) and JSON. It must have a word."""
        assert self.index is not None, "an index without words has nothing to save"
        self.index.save(directory, show_progress=False)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> BM25:
        """The index that `save` wrote. Nothing is unpickled.

        Raises:
            OSError, ValueError, KeyError: a file is missing, or is not what it was.
        """
        made = cls.__new__(cls)
        made.index = _bm25s().BM25.load(directory, show_progress=False, allow_pickle=False)
        made.vocabulary = made.index.vocab_dict
        made.size = int(made.index.scores["num_docs"])
        return made

    def scores(self, query: str) -> Float[np.ndarray, " texts"]:
        """BM25 of every text, fp32."""
        known = [self.vocabulary[word] for word in words(query) if word in self.vocabulary]
        if self.index is None or not known:
            return np.zeros(self.size, np.float32)
        return self.index.get_scores_from_ids(known)

    def rank(self, query: str, k: int) -> list[int]:
        """See `Retriever`."""
        return best(self.scores(query), k)


class Fused:
    """Reciprocal rank fusion: score(d) = sum over rankings of 1 / (60 + rank of d), ranks from 1."""

    def __init__(self, retrievers: Sequence[Retriever], size: int) -> None:
        self.retrievers = retrievers
        self.size = size

    def rank(self, query: str, k: int) -> list[int]:
        """See `Retriever`."""
        scores = np.zeros(self.size)
        for retriever in self.retrievers:
            order = retriever.rank(query, self.size)
            scores[order] += 1.0 / (RRF_CONSTANT + 1 + np.arange(len(order)))
        return best(scores, k)
