"""The vector of each prompt: from an encoder once a text, or the mean of the base's own embeddings.

An *instance* is a prompt: the tokens before the first that carries loss, all messages and documents included. An
encoder reads them as text, without special tokens; the base's embeddings are looked up by token.

Shape legend: n prompts, h width of a vector, b prompts at a time, s tokens of the longest, v vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from jora.encoders import Encoder
from jora.errors import InputError
from jora.files import atomic_write
from jora.reporting import SILENT, Reporter

ROWS = 8  # prompts whose embeddings are averaged at a time
SHORTEST = 16


def mean_embeddings(model: Any, prompts: Sequence[Sequence[int]]) -> Float32[np.ndarray, "n h"]:
    """The mean of each prompt's embeddings, divided by its root mean square: tables differ in scale by far."""
    vectors = np.zeros((len(prompts), model.config.embed), np.float32)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), ROWS):
        members = order[start : start + ROWS]
        length = max(SHORTEST, 1 << (len(prompts[members[0]]) - 1).bit_length())
        tokens = np.zeros((ROWS, length), np.int32)
        mask = np.zeros((ROWS, length), bool)
        for row, index in enumerate(members):
            tokens[row, : len(prompts[index])] = prompts[index]
            mask[row, : len(prompts[index])] = True
        vectors[members] = np.asarray(_means(model.params.embed, tokens, mask))[: len(members)]
    return vectors


@jax.jit
def _means(table: Float[Array, "v h"], tokens: Int[Array, "b s"], mask: Bool[Array, "b s"]) -> Float[Array, "b h"]:
    vectors = jnp.where(mask[:, :, None], table[tokens].astype(jnp.float32), 0)
    mean = vectors.sum(axis=1) / jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
    return mean * jax.lax.rsqrt(jnp.mean(mean * mean, axis=1, keepdims=True) + 1e-30)


def text_vectors(
    encoder: Encoder, texts: Sequence[str], cache: Path | None = None, reporter: Reporter = SILENT
) -> Float32[np.ndarray, "n h"]:
    """A vector a text; equal texts are encoded once, and those that the file `cache` has not at all.

    The file (safetensors: hashes [n, 32], vectors [n, h]) gets what was missing. Raises InputError where it is of
    another encoder.
    """
    keys = [hashlib.sha256(text.encode()).digest() for text in texts]
    known = {} if cache is None or not cache.exists() else _read(cache, encoder)
    missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
    if missing:
        known |= dict(zip(missing, encoder.encode(list(missing.values()), reporter), strict=True))
        if cache is not None:
            _write(cache, encoder, known)
    return np.stack([known[key] for key in keys]) if keys else np.zeros((0, encoder.width), np.float32)


def _read(path: Path, encoder: Encoder) -> dict[bytes, np.ndarray]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            made_by = (file.metadata() or {}).get("encoder")
            hashes, vectors = file.get_tensor("hashes"), file.get_tensor("vectors")
    except SafetensorError as error:
        raise InputError(f"{path}: no whole file of prompt vectors ({error}); delete it") from error
    if made_by != encoder.fingerprint:
        raise InputError(f"{path}: vectors of another encoder: use that one, or another output directory")
    return {key.tobytes(): vector for key, vector in zip(hashes, vectors, strict=True)}


def _write(path: Path, encoder: Encoder, known: dict[bytes, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    tensors = {
        "hashes": np.stack([np.frombuffer(key, np.uint8) for key in known]),
        "vectors": np.stack(list(known.values())).astype(np.float32),
    }
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, {"encoder": encoder.fingerprint})
