"""Retrieval by embeddings, with sentence-transformers (extra `[dense]`; it brings torch with it)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jora.data.retrieval import best
from jora.errors import InputError


class Dense:
    """Cosine similarity of sentence embeddings.

    Raises `InputError` where the extra is not installed or the model cannot be loaded.
    """

    def __init__(self, texts: Sequence[str], model: str) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise InputError(
                "dense retrieval needs sentence-transformers: pip install 'jora[dense]', or use bm25"
            ) from None
        try:
            self.model = SentenceTransformer(model)
        except OSError as error:
            reason = str(error).split("\n", 1)[0]
            raise InputError(f"embedding model {model!r} cannot be loaded: {reason}") from None
        embedded = self.model.encode_document(list(texts), normalize_embeddings=True, show_progress_bar=False)
        self.texts = np.asarray(embedded, np.float32)

    def rank(self, query: str, k: int) -> list[int]:
        """See `retrieval.Retriever`."""
        embedded = self.model.encode_query(query, normalize_embeddings=True, show_progress_bar=False)
        return best(self.texts @ np.asarray(embedded, np.float32), k)
