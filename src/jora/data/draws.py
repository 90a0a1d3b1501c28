"""Random numbers that depend on a key alone: the same on every machine and numpy version."""

from __future__ import annotations

import hashlib

import numpy as np
from jaxtyping import Int64, UInt64


def raw_draws(count: int, *key: int) -> UInt64[np.ndarray, " count"]:
    """`count` uniform uint64 numbers for `key` (at most four integers, taken modulo 2**64).

    The words of Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) are read
    directly: numpy promises to keep the stream of a bit generator, but not that of
    `Generator.permutation`, and a resumed run must see the order that the first one saw.
    """
    words = [part % 2**64 for part in key] + [0] * (4 - len(key))
    counter = np.array([0, 0, *words[2:]], np.uint64)  # the low words count the draws
    generator = np.random.Philox(key=np.array(words[:2], np.uint64), counter=counter)
    return np.asarray(generator.random_raw(count), np.uint64)


def permutation(count: int, *key: int) -> Int64[np.ndarray, " count"]:
    """A random order of range(count) for `key`."""
    return np.argsort(raw_draws(count, *key), kind="stable")


def uniform(*key: int) -> float:
    """One number in [0, 1) for `key`."""
    return int(raw_draws(1, *key)[0] >> np.uint64(11)) / 2.0**53


def text_key(text: str) -> int:
    """A 64-bit key that depends on the text alone, so that it survives additions before it in a file."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
