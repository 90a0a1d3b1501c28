"""The host's side of sampling: from requests' options to the arrays of the sampling program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int32, UInt16, UInt32

from jora.errors import InputError
from jora.inference.sampling import Sampling
from jora.serve.device.sampling import MOST_COUNTED, SampleRows
from jora.serve.requests import SamplingOptions

MOST_BIASED = 300  # tokens of a logit bias, as OpenAI's API allows
MOST_ENDS = 32  # tokens that can be forbidden before min_tokens
LEAST_TOP_P = 1e-30  # keeps one token as well; what is 0 in fp32 would keep all
LEAST_REPETITION = 1e-30  # logits divided by less may overflow


def sample_row(options: SamplingOptions, seed: int, ends: Sequence[int], vocabulary: int) -> SampleRows:
    """One row's arrays, [1, ...], at step 0. ends: all tokens that end it (EOS unless ignored, stop tokens).

    Raises InputError where a token of the bias is not in the vocabulary, or where there are too many of a thing.
    """
    ids = list(options.logit_bias)
    if len(ids) > MOST_BIASED:
        raise InputError(f"logit_bias names {len(ids)} tokens; at most {MOST_BIASED} are possible")
    if wrong := [i for i in ids if not 0 <= i < vocabulary]:
        raise InputError(f"logit_bias: there is no token {wrong[0]}; the vocabulary has {vocabulary}")
    if options.min_tokens and len(ends) > MOST_ENDS:
        raise InputError(f"{len(ends)} tokens end the answer; with min_tokens at most {MOST_ENDS} can")
    forbidden = ends if options.min_tokens else ()
    return SampleRows(
        sampling=Sampling(
            _one(options.temperature, np.float32),
            _one(min(options.top_k, vocabulary), np.int32),
            _one(max(options.top_p, LEAST_TOP_P), np.float32),
            _one(options.min_p, np.float32),
            _one(seed, np.uint32),
        ),
        step=_one(0, np.int32),
        presence=_one(options.presence_penalty, np.float32),
        frequency=_one(options.frequency_penalty, np.float32),
        repetition=_one(max(options.repetition_penalty, LEAST_REPETITION), np.float32),
        min_tokens=_one(options.min_tokens, np.int32),
        ends=_padded(forbidden, MOST_ENDS, np.int32, -1),
        bias_ids=_padded(ids, MOST_BIASED, np.int32, -1),
        bias=_padded(list(options.logit_bias.values()), MOST_BIASED, np.float32, 0),
        logprobs=_one(options.logprobs is not None, np.bool_),
    )


# Host arrays stand in for the device's until a program takes them.
def _one(value: float, dtype: Any) -> Any:
    return np.array([value], dtype)


def _padded(values: Sequence[float], length: int, dtype: Any, filler: int) -> Any:
    array = np.full((1, length), filler, dtype)
    array[0, : len(values)] = values
    return array


def at_step(rows: SampleRows, steps: Any) -> SampleRows:
    """These rows, at these steps (int32, tokens that each has generated)."""
    return rows._replace(step=steps)


def answer_seed(seed: int, index: int) -> int:
    """Every answer of a request has draws of its own."""
    # Of any sign, as OpenAI's API allows: numpy takes only those from 0 on.
    return int(np.random.SeedSequence([seed % 2**64, index]).generate_state(1)[0])


class RowTable:
    """The rows of the decode batch; on the device again only when one has changed."""

    def __init__(self, rows: int):
        idle = sample_row(SamplingOptions(temperature=0.0), 0, (), 1)
        self._idle = idle
        self._host: SampleRows = jax.tree.map(lambda x: np.repeat(x, rows, axis=0), idle)
        self._device: SampleRows | None = None

    def put(self, slot: int, row: SampleRows) -> None:
        """Row `slot` from now on: the result of `sample_row`."""
        # A copy, not in place: on a CPU the device's arrays may be the host's own memory, and in use.
        self._host = jax.tree.map(lambda table, x: _with_row(table, slot, x), self._host, row)
        self._device = None

    def clear(self, slot: int) -> None:
        """Row `slot` is free: it asks for nothing."""
        self.put(slot, self._idle)

    def at(self, steps: Int32[np.ndarray, " b"]) -> SampleRows:
        """All rows, at these steps (tokens that each has generated)."""
        if self._device is None:
            self._device = jax.tree.map(jax.numpy.asarray, self._host)
        return at_step(self._device, np.array(steps, np.int32))  # a copy here too: the caller may count on in place


def _with_row(table: np.ndarray, slot: int, row: np.ndarray) -> np.ndarray:
    changed = table.copy()
    changed[slot] = row[0]
    return changed


def prompt_bits(tokens: Sequence[int], vocabulary: int) -> UInt32[np.ndarray, " w"]:
    """Which tokens there are: token t is bit t % 32 of word t // 32."""
    words = np.zeros(-(-vocabulary // 32), np.uint32)
    ids = np.unique(np.asarray(tokens, np.int64))
    np.bitwise_or.at(words, ids // 32, (1 << (ids % 32)).astype(np.uint32))
    return words


def token_counts(tokens: Sequence[int], vocabulary: int) -> UInt16[np.ndarray, " v"]:
    """How often each token occurs, as `start_row` takes it."""
    counts = np.bincount(np.asarray(tokens, np.int64), minlength=vocabulary)
    return np.minimum(counts, MOST_COUNTED).astype(np.uint16)
