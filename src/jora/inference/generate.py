"""`jora.generate`: text in, new text out; and the same over tokens.

Prompts of like length share a batch. Prompt lengths, rows and cache slots come in a few sizes, so that
the next prompt of a like size compiles nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int32

from jora.data.chat import Template, fill_documents, tokenise_example
from jora.data.formats import Example, Message, parse_example
from jora.errors import InputError
from jora.inference.decode import NOTHING, RUN, Program, decode, prefill, ready
from jora.inference.sampling import Sampling, sampling_rows
from jora.methods.method import Adapter, State
from jora.models.model import Model
from jora.models.params import Params
from jora.models.source import read_json
from jora.reporting import SILENT, Reporter

Chat = Sequence[Message]
Stopped = Callable[[Sequence[int]], bool]  # given a row's new tokens: is that enough?
SMALLEST = 16  # tokens of the smallest prompt bucket
STOP_RUN = 8  # tokens between two looks for a stop string


def generate(
    model: Model,
    prompts: str | Sequence[str | Chat] | Chat,
    adapter: Adapter | None = None,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int = 0,
    stop: str | Sequence[str] | None = None,
    batch_size: int = 8,
    reporter: Reporter = SILENT,
) -> str | list[str]:
    """The text that the model writes after each prompt, without the prompt and special tokens.

    Args:
        model: the base.
        prompts: a string is taken as it is (BOS is added where the tokenizer adds it); a conversation, a
            list of {"role", "content"}, is written by the model's chat template. One prompt gives a
            string, a list of prompts a list.
        adapter: applied if given.
        max_new_tokens: most tokens of one answer.
        temperature: 0 is greedy; see `sampling.Sampling` for the filters.
        seed: prompt i of the list draws from (seed, i), whatever shares its batch.
        stop: the text ends before the first of these strings.
        batch_size: prompts on the devices at a time.
        reporter: told of finished prompts.

    Raises:
        InputError: an option out of range, an empty prompt, or more positions than the model has.
    """
    template = Template(model.tokenizer)
    single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Mapping))
    several: Sequence[Any] = [prompts] if single else prompts
    texts = answer_texts(
        model,
        [prompt_ids(prompt, template, f"prompt {i}") for i, prompt in enumerate(several)],
        adapter,
        template=template,
        stop=(stop,) if isinstance(stop, str) else tuple(stop or ()),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        batch_size=batch_size,
        reporter=reporter,
    )
    return texts[0] if single else texts


def answer_texts(
    model: Model,
    prompts: Sequence[Sequence[int]],
    adapter: Adapter | None,
    *,
    template: Template,
    stop: tuple[str, ...] = (),
    **options: Any,
) -> list[str]:
    """The new text of each prompt of tokens. `options`: those of `generate_tokens`."""
    tokenizer = template.tokenizer

    def text_of(ids: Sequence[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    def stopped(ids: Sequence[int]) -> bool:
        return any(s in text_of(ids) for s in stop)

    ends = end_tokens(model, template)
    found = generate_tokens(model, prompts, adapter, ends=ends, stopped=stopped if stop else None, **options)
    return [_cut(text_of(ids), stop) for ids in found]


def _cut(text: str, stop: tuple[str, ...]) -> str:
    places = [at for at in (text.find(s) for s in stop) if at >= 0]
    return text[: min(places)] if places else text


def prompt_ids(prompt: str | Chat, template: Template, where: str) -> list[int]:
    """A prompt as tokens: a conversation through the chat template, a string with BOS where that is added."""
    if isinstance(prompt, str):
        return template.with_bos(template.encode(prompt)[0])
    example = fill_documents(parse_example({"messages": list(prompt)}, where))
    if example.messages[-1]["role"] == "assistant":
        raise InputError(f"{where}: the conversation ends with the assistant; end it with what it should answer")
    return template.encode(template.render(example.messages, where, generate=True))[0]


def end_tokens(model: Model, template: Template | None = None) -> tuple[int, ...]:
    """The tokens that end an answer.

    Those of generation_config.json and config.json; with a template also the tokenizer's EOS and the
    special token that ends an assistant's turn (<end_of_turn>, <|eot_id|>, <|im_end|>), which older
    checkpoints forget to list.
    """
    ends: set[int] = set()
    stored = Path(model.path) / "generation_config.json"
    for settings in (read_json(stored) if stored.is_file() else {}, model.hf_config):
        ids = settings.get("eos_token_id")
        ends.update([] if ids is None else [ids] if isinstance(ids, int) else ids)
    if template is not None:
        turn: tuple[Message, ...] = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
        learned = tokenise_example(Example(turn), template)[-1]
        last = int(learned.tokens[learned.loss][-1])
        ends.update({template.tokenizer.eos_token_id} | ({last} & template.special_ids))
    return tuple(sorted(ends))


def generate_tokens(
    model: Model,
    prompts: Sequence[Sequence[int]],
    adapter: Adapter | None = None,
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
) -> list[list[int]]:
    """The new tokens of each prompt, without the end token. Options as for `generate`.

    ends: tokens that end a row (default: `end_tokens(model)`). stopped: a function of a row's new tokens
    so far; a row for which it returns True gets no more.
    """
    method, state = model.parts_of(ready(model, adapter))
    reserved = 0 if method is None else method.prompt_slots
    _check(model, prompts, max_new_tokens, batch_size, reserved)
    if not prompts:
        return []
    instances = None if method is None else method.instances(model, prompts, reporter=reporter)
    # Words that stand in the places of a method's own vectors are not read.
    prompts = [[0] * reserved + list(prompt) for prompt in prompts]
    end_ids = end_tokens(model) if ends is None else tuple(ends)
    rows = _rows(min(batch_size, len(prompts)), batch_size, model.layout.batch_shards)
    sampling = sampling_rows(rows, temperature, top_k, top_p, min_p)
    program = Program(model.config, model.layout, method)
    results: dict[int, list[int]] = {}
    reporter.start(len(prompts), "generating, prompts")
    started, made = time.perf_counter(), 0

    def on_tokens(count: int) -> None:
        nonlocal made
        made += count
        reporter.update(len(results), tokens_per_s=made / (time.perf_counter() - started))

    for members in _batches(prompts, rows):
        seeds = np.zeros(rows, np.uint32)
        seeds[: len(members)] = [_row_seed(seed, i) for i in members]
        own_sampling = sampling._replace(seed=jnp.asarray(seeds))
        instance = None if instances is None else _filled(instances[members], rows)
        batch = _Request([prompts[i] for i in members], own_sampling, end_ids, stopped, instance)
        found = _run(model.params, state, program, batch, max_new_tokens, on_tokens)
        results.update(zip(members, found, strict=True))
        on_tokens(0)
    reporter.finish(tokens=made)
    return [results[i] for i in range(len(prompts))]


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


def _batches(prompts: Sequence[Sequence[int]], rows: int) -> Iterator[list[int]]:
    """Indices of the prompts of each batch: like lengths together, the longest first (it needs the most memory)."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), rows):
        yield order[start : start + rows]


class _Request(NamedTuple):
    """One batch: fewer prompts than rows leave rows that have ended from the start."""

    prompts: list[Sequence[int]]
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
) -> list[list[int]]:
    """The new tokens of one batch's rows, a device run at a time."""
    prompts, sampling, ends, stopped, instance = request
    rows, longest = len(sampling.seed), max(len(p) for p in prompts)
    tokens, lengths = _padded(prompts, rows, bucket(longest))
    slots, end_array = bucket(longest + max_new_tokens), _end_array(ends)
    stream, out = prefill(params, state, tokens, lengths, sampling, end_array, instance, program=program, slots=slots)
    found: list[list[int]] = [[] for _ in prompts]
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
            return [_until(row, ends, stopped) for row in found]
        limit = min(remaining, RUN if stopped is None else STOP_RUN)
        stream, out = decode(params, state, stream, sampling, end_array, np.int32(limit), instance, program=program)
        remaining -= limit


def _padded(
    prompts: Sequence[Sequence[int]], rows: int, length: int
) -> tuple[Int32[np.ndarray, "b p"], Int32[np.ndarray, " b"]]:
    tokens, lengths = np.zeros((rows, length), np.int32), np.zeros(rows, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        lengths[row] = len(prompt)
    return tokens, lengths


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
