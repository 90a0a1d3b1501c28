"""Generation over tokens, and the score of reference answers on the way.

Prompts of like length share a batch. Prompt lengths, rows and cache slots come in a few sizes, so that
the next prompt of a like size compiles nothing.

An evaluation wants two things of the same prompt: an answer, and the loss of the reference. The pass that reads a
prompt reads the reference behind it; generation then begins at the prompt's end and overwrites what came after.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int32

from jora.data.batches import Tokenised, answer_bucket
from jora.errors import InputError
from jora.inference.decode import NOTHING, RUN, Program, decode, prefill, ready
from jora.inference.ends import end_tokens
from jora.inference.sampling import Sampling, sampling_rows
from jora.methods.method import Adapter, State
from jora.models.head import Answers
from jora.models.model import Model
from jora.models.params import Params
from jora.reporting import SILENT, Reporter

Stopped = Callable[[Sequence[int]], bool]  # given a row's new tokens: is that enough?
SMALLEST = 16  # tokens of the smallest prompt bucket
STOP_RUN = 8  # tokens between two looks for a stop string


class Generated(NamedTuple):
    """What came of one prompt: its new tokens without the end token, and -log p of each of its reference's answers."""

    tokens: list[int]
    nll: Float32[np.ndarray, " n"]


def generate_tokens(
    model: Model, prompts: Sequence[Sequence[int]], adapter: Adapter | None = None, **options: Any
) -> list[list[int]]:
    """The new tokens of each prompt, without the end token. `options`: those of `generate_and_score`."""
    return [found.tokens for found in generate_and_score(model, prompts, adapter, **options)]


def generate_and_score(
    model: Model,
    prompts: Sequence[Sequence[int]],
    adapter: Adapter | None = None,
    references: Sequence[Tokenised | None] | None = None,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int = 0,
    ends: Sequence[int] | None = None,
    stopped: Stopped | None = None,
    batch_size: int = 8,
    reporter: Reporter = SILENT,
) -> list[Generated]:
    """The new tokens of each prompt, and the scores of references. Options as for `generate`.

    references: for each prompt an example that begins with it, or None; its tokens that carry loss are scored, in
    nats, teacher-forced. ends: tokens that end a row (default: `end_tokens(model)`). stopped: a function of a row's
    new tokens so far; a row for which it returns True gets no more.
    """
    method, state = model.parts_of(ready(model, adapter))
    reserved = 0 if method is None else method.prompt_slots
    _check(model, prompts, max_new_tokens, batch_size, reserved)
    if not prompts:
        return []
    instances = None if method is None else method.instances(model, prompts, reporter=reporter)
    texts = [_text(prompt, reserved, reference) for prompt, reference in _paired(prompts, references)]
    end_ids = end_tokens(model) if ends is None else tuple(ends)
    rows = _rows(min(batch_size, len(prompts)), batch_size, model.layout.batch_shards)
    sampling = sampling_rows(rows, temperature, top_k, top_p, min_p)
    program = Program(model.config, model.layout, method)
    results: dict[int, Generated] = {}
    reporter.start(len(prompts), "generating, prompts" if references is None else "answering and scoring, prompts")
    started, made = time.perf_counter(), 0

    def on_tokens(count: int) -> None:
        nonlocal made
        made += count
        reporter.update(len(results), tokens_per_s=made / (time.perf_counter() - started))

    for members in _batches(texts, rows):
        seeds = np.zeros(rows, np.uint32)
        seeds[: len(members)] = [_row_seed(seed, i) for i in members]
        own_sampling = sampling._replace(seed=jnp.asarray(seeds))
        instance = None if instances is None else _filled(instances[members], rows)
        batch = _Request([texts[i] for i in members], own_sampling, end_ids, stopped, instance)
        found = _run(model.params, state, program, batch, max_new_tokens, on_tokens)
        results.update(zip(members, found, strict=True))
        on_tokens(0)
    reporter.finish(tokens=made)
    return [results[i] for i in range(len(prompts))]


def _paired(
    prompts: Sequence[Sequence[int]], references: Sequence[Tokenised | None] | None
) -> Iterator[tuple[Sequence[int], Tokenised | None]]:
    return zip(prompts, [None] * len(prompts) if references is None else references, strict=True)


class _Text(NamedTuple):
    """What is read of one prompt: `tokens`, of which the first `prompt` are the prompt and the rest its reference.

    targets: which tokens are scored.
    """

    tokens: list[int]
    prompt: int
    targets: list[int]


def _text(prompt: Sequence[int], reserved: int, reference: Tokenised | None) -> _Text:
    # Words that stand in the places of a method's own vectors are not read.
    words, targets = list(prompt), []
    if reference is not None:
        words = reference.tokens.tolist()
        assert words[: len(prompt)] == list(prompt), "a reference begins with its prompt"
        targets = (np.flatnonzero(reference.loss[1:]) + 1 + reserved).tolist()
    return _Text([0] * reserved + words, reserved + len(prompt), targets)


def _check(model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int, reserved: int) -> None:
    if max_new_tokens < 1 or batch_size < 1:
        raise InputError(f"max_new_tokens and batch_size must be at least 1, found {max_new_tokens} and {batch_size}")
    limit = model.config.max_positions
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise InputError(f"prompt {number} is empty; give at least one token")
        if reserved + len(prompt) + max_new_tokens > limit:
            soft = f" (and {reserved} of the adapter)" if reserved else ""
            raise InputError(
                f"prompt {number}: its {len(prompt)} tokens{soft} and max_new_tokens {max_new_tokens} are more than "
                f"the model's {limit} positions; shorten the prompt or lower max_new_tokens"
            )


def _row_seed(seed: int, index: int) -> int:
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])


def bucket(length: int) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, 128, ... that holds `length`."""
    size = SMALLEST
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def _rows(count: int, most: int, multiple: int) -> int:
    """Rows of every batch of one call: a power of two, at most `most`, that the mesh divides."""
    rows = min(1 << (count - 1).bit_length(), most)
    return -(-rows // multiple) * multiple


def _batches(texts: Sequence[_Text], rows: int) -> Iterator[list[int]]:
    """Indices of the texts of each batch: like lengths together, the longest first (it needs the most memory)."""
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i].tokens))
    for start in range(0, len(order), rows):
        yield order[start : start + rows]


class _Request(NamedTuple):
    """One batch: fewer texts than rows leave rows that have ended from the start."""

    texts: list[_Text]
    sampling: Sampling
    ends: tuple[int, ...]
    stopped: Stopped | None
    instance: Float32[np.ndarray, "b h"] | None


def _filled(vectors: Float32[np.ndarray, "n h"], rows: int) -> Float32[np.ndarray, "b h"]:
    return np.pad(vectors, ((0, rows - len(vectors)), (0, 0)))


def _run(
    params: Params,
    state: State | None,
    program: Program,
    request: _Request,
    max_new_tokens: int,
    on_tokens: Callable[[int], None],
) -> list[Generated]:
    """What comes of one batch's rows, a device run at a time."""
    texts, sampling, ends, stopped, instance = request
    rows = len(sampling.seed)
    tokens, lengths = _padded(texts, rows)
    slots = bucket(max(tokens.shape[1], max(text.prompt for text in texts) + max_new_tokens))
    end_array, answers = _end_array(ends), _answers(texts, rows)
    stream, out, nll = prefill(
        params, state, tokens, lengths, sampling, end_array, instance, answers, program=program, slots=slots
    )
    found: list[list[int]] = [[] for _ in texts]
    remaining = max_new_tokens - 1
    while True:
        before = sum(map(len, found))
        for row, new in zip(found, np.asarray(out), strict=False):
            row += [int(t) for t in new if t != NOTHING]
        on_tokens(sum(map(len, found)) - before)
        if stopped is not None:
            halted = [stopped(row) for row in found] + [True] * (rows - len(found))
            stream = stream._replace(ended=stream.ended | np.array(halted))
        if remaining <= 0 or np.asarray(stream.ended).all():
            scores = np.zeros((rows, 0), np.float32) if nll is None else np.asarray(nll)
            return [
                Generated(_until(row, ends, stopped), own[: len(text.targets)])
                for row, text, own in zip(found, texts, scores, strict=False)
            ]
        limit = min(remaining, RUN if stopped is None else STOP_RUN)
        stream, out = decode(params, state, stream, sampling, end_array, np.int32(limit), instance, program=program)
        remaining -= limit


def _padded(texts: Sequence[_Text], rows: int) -> tuple[Int32[np.ndarray, "b p"], Int32[np.ndarray, " b"]]:
    """The tokens of a batch, and how many of each row are its prompt."""
    length = bucket(max(len(text.tokens) for text in texts))
    tokens, lengths = np.zeros((rows, length), np.int32), np.zeros(rows, np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text.tokens)] = text.tokens
        lengths[row] = text.prompt
    return tokens, lengths


def _answers(texts: Sequence[_Text], rows: int) -> Answers | None:
    """What is scored of a batch; None where nothing is."""
    most = max(len(text.targets) for text in texts)
    if most == 0:
        return None
    places, targets = (np.zeros((rows, answer_bucket(most)), np.int32) for _ in range(2))
    weights = np.zeros(places.shape, np.float32)
    for row, text in enumerate(texts):
        count = len(text.targets)
        places[row, :count] = np.array(text.targets, np.int32) - 1
        targets[row, :count] = [text.tokens[at] for at in text.targets]
        weights[row, :count] = 1.0
    return Answers(jnp.asarray(places), jnp.asarray(targets), jnp.asarray(weights))


def _end_array(ends: tuple[int, ...]) -> Int32[np.ndarray, " e"]:
    """The end tokens in an array of 8, 16, ... places: their number must not decide the program."""
    array = np.full(max(8, -(-len(ends) // 8) * 8), NOTHING, np.int32)
    array[: len(ends)] = ends
    return array


def _until(row: list[int], ends: tuple[int, ...], stopped: Stopped | None) -> list[int]:
    """The row without its end token; with stop strings no longer than the first token that completes one."""
    kept = row[:-1] if row and row[-1] in ends else row
    if stopped is None:
        return kept
    for count in range(1, len(kept) + 1):
        if stopped(kept[:count]):
            return kept[:count]
    return kept
