"""A text encoder by name: a BERT or RoBERTa directory in JAX, or a sentence-transformers directory (`[dense]`)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float32

from jora.encoders.bert import hidden_states, load_params
from jora.encoders.config import config_from_hf
from jora.errors import InputError
from jora.models.model import load_tokenizer, resolve
from jora.models.source import SafetensorsSource, read_json
from jora.reporting import SILENT, Reporter

ROWS = 16  # texts on the device at a time
SHORTEST = 16  # tokens of the smallest batch; others are powers of two, so that few programs are compiled
SENTENCE_TRANSFORMERS = "modules.json"  # what such a directory has and no other


class Encoder(Protocol):
    """Frozen: equal texts have equal vectors (up to rounding), whatever they are encoded with."""

    @property
    def width(self) -> int:
        """Elements of a vector."""
        ...

    @property
    def fingerprint(self) -> str:
        """A hash that training the encoder would change."""
        ...

    def encode(self, texts: Sequence[str], reporter: Reporter = SILENT) -> Float32[np.ndarray, "n h"]:
        """A vector a text. Loads the weights, and keeps none of them unless it was opened to keep them."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of its weights where it computes: from the headers of its files."""
        ...

    def warm_up(self) -> None:
        """Do now what the first text of any length would wait for, where it was opened to keep its weights."""
        ...


def open_encoder(name: str, keep: bool = False) -> Encoder:
    """The encoder of a directory or a hub id; its weights are read when they are needed, and again each time.

    keep: they stay loaded after the first use, for one text now and another then.

    Raises InputError where there is none, or one of an architecture that is not computed here.
    """
    path = resolve(name)
    if not path.is_dir():
        raise InputError(f"encoder {name}: not a model directory; give a BERT, RoBERTa or sentence-transformers one")
    kind = SentenceEncoder if (path / SENTENCE_TRANSFORMERS).is_file() else BertEncoder
    return kind(path, keep)


class BertEncoder:
    """BERT or RoBERTa. A text's vector is the last hidden state of its first token ([CLS], <s>).

    Longer texts lose their beginning, as in the reference of LoPA: what is asked stands at the end.
    """

    def __init__(self, path: Path, keep: bool = False) -> None:
        self.path, self._load = path, cache(self._read) if keep else self._read
        self.config = config_from_hf(read_json(path / "config.json"), str(path / "config.json"))

    @property
    def width(self) -> int:
        return self.config.width

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.path)

    def encode(self, texts: Sequence[str], reporter: Reporter = SILENT) -> Float32[np.ndarray, "n h"]:
        ids = self.tokens(texts)
        params = self._load()
        vectors = np.zeros((len(ids), self.width), np.float32)
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        reporter.start(len(ids), "encoding prompts")
        for start in range(0, len(order), ROWS):
            members = order[start : start + ROWS]
            vectors[members] = self._vectors(params, [ids[i] for i in members])
            reporter.update(start + len(members))
        reporter.finish()
        return vectors

    @property
    def nbytes(self) -> int:
        return weight_bytes(self.path)

    def warm_up(self) -> None:
        self.encode([""])  # reads tokenizer and weights
        params, length = self._load(), SHORTEST
        while length < 2 * self.config.max_tokens:
            self._vectors(params, [[self.config.pad_id] * min(length, self.config.max_tokens)])
            length *= 2

    def _vectors(self, params: Any, ids: Sequence[Sequence[int]]) -> Float32[np.ndarray, "b h"]:
        tokens, mask = self._padded(ids)
        return np.asarray(hidden_states(params, tokens, mask, config=self.config)[: len(ids), 0])

    def _read(self) -> Any:
        return load_params(SafetensorsSource(self.path), self.config, str(self.path))

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids with [CLS] and [SEP], at most as many as the encoder has positions."""
        options = {"truncation": True, "max_length": self.config.max_tokens}
        return self._tokenizer(list(texts), **options)["input_ids"] if texts else []

    @cached_property
    def _tokenizer(self) -> Any:
        tokenizer = load_tokenizer(self.path)
        tokenizer.truncation_side = "left"
        return tokenizer

    def _padded(self, ids: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        longest = max(map(len, ids))
        length = min(max(SHORTEST, 1 << (longest - 1).bit_length()), self.config.max_tokens)
        rows = 1 << (len(ids) - 1).bit_length()  # powers of two here as well, up to ROWS
        tokens = np.full((rows, length), self.config.pad_id, np.int32)
        lengths = np.ones((rows, 1), np.int32)
        for row, found in enumerate(ids):
            tokens[row, : len(found)] = found
            lengths[row] = len(found)
        return tokens, np.arange(length) < lengths


class SentenceEncoder:
    """Whatever sentence-transformers computes (extra `[dense]`; it brings torch with it), pooling included."""

    def __init__(self, path: Path, keep: bool = False) -> None:
        self.path, self._load = path, cache(self._read) if keep else self._read

    @cached_property
    def width(self) -> int:
        return self.encode(["a"]).shape[1]

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.path)

    def encode(self, texts: Sequence[str], reporter: Reporter = SILENT) -> Float32[np.ndarray, "n h"]:
        reporter.start(len(texts), "encoding prompts")
        vectors = np.asarray(self._load().encode(list(texts), show_progress_bar=False), np.float32)
        reporter.finish()
        return vectors

    @property
    def nbytes(self) -> int:
        return weight_bytes(self.path)

    def warm_up(self) -> None:
        self.encode(["a"])

    def _read(self) -> Any:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise InputError(
                f"encoder {self.path}: needs sentence-transformers: pip install 'jora[dense]', or give a BERT or "
                "RoBERTa directory"
            ) from None
        return SentenceTransformer(str(self.path))


def weight_bytes(path: Path) -> int:
    """Of all its tensors, in fp32."""
    source = SafetensorsSource(path)
    return sum(4 * math.prod(source.shape(name)) for name in source.names())


def fingerprint(path: Path) -> str:
    """Of every tensor's name, shape and first row: reading all of it would cost more than encoding does."""
    source = SafetensorsSource(path)
    found = hashlib.sha256()
    for name in sorted(source.names()):
        shape = source.shape(name)
        found.update(f"{name} {shape}".encode())
        first = tuple(slice(0, 1 if len(shape) > 1 and axis == 0 else n) for axis, n in enumerate(shape))
        found.update(source.read(name, first).tobytes())
    return found.hexdigest()[:16]
