"""The forward programs over pages: prompts in chunks and decode steps give what transformers gives for the whole."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tests.sharding.collectives import collectives
from tests.tiny import VOCAB, assert_close, logits, tiny, tokens

import jora
from jora.models.model import Model
from jora.serve.device.programs import Program, PromptScores, SoftPrompt, decode, prefill
from jora.serve.pages.layout import PoolLayout
from jora.sharding import MeshSpec

TIGHT = 1e-4
WIDTHS = (4, 16)
SLOW = pytest.mark.slow
MAX_LENGTH = 64
FAST = {"xla_backend_optimization_level": "0"}


@cache
def load(family: str, mesh: str | None = None, quant: Any = None, **overrides: Any) -> Model:
    return jora.load_model(tiny(family, **overrides)[1], dtype="float32", mesh=mesh, quant=quant)


_COMPILED: dict[Any, Any] = {}


def run(function: Any, program: Program, *arguments: Any) -> Any:
    """function(*arguments, program=program), compiled in haste: most of a test's time would go into machine code."""
    leaves, structure = jax.tree.flatten(arguments)
    key = (function, program, structure, *((x.shape, str(x.dtype)) for x in leaves))
    if key not in _COMPILED:
        _COMPILED[key] = function.lower(*arguments, program=program).compile(FAST)
    return _COMPILED[key](*arguments)


class Server:
    """Hands out shuffled pages, returns those that no window sees any more, and runs the programs."""

    def __init__(self, model: Model, rows: int, page_tokens: int):
        self.model = model
        self.shape = PoolLayout.of(model.config, model.layout, jnp.float32, page_tokens)
        self.program = Program(model.config, model.layout, self.shape)
        groups, blocks = len(self.shape.groups), self.shape.blocks(MAX_LENGTH)
        pages = 1 + groups * rows * blocks
        self.free = np.random.default_rng(1).permutation(np.arange(1, pages)).tolist()
        self.tables = np.zeros((groups, rows, blocks), np.int32)
        # What nobody wrote must not matter.
        self.pool = self.shape.new_pool(pages, model.layout) + np.nan
        self.lengths = np.full(rows, -1, np.int32)

    def _hold(self, row: int, start: int, count: int) -> None:
        """Pages for the positions start .. start + count - 1, and none before the first query's window."""
        for group in range(len(self.shape.groups)):
            table = self.tables[group, row]
            for block in range(start // self.shape.page_tokens, self.shape.blocks(start + count)):
                if not table[block]:
                    table[block] = self.free.pop()
            first = self.shape.first_block(group, start)
            self.free = [page for page in table[:first].tolist() if page] + self.free
            table[:first] = 0

    def prefill(
        self, row: int, ids: np.ndarray, sizes: Sequence[int], soft: SoftPrompt | None = None, scored: bool = False
    ) -> tuple[np.ndarray, list[PromptScores]]:
        """A prompt in chunks of these sizes, each padded to a width with junk. Returns the last logits."""
        at, found, scores = 0, None, []
        for count in sizes:
            width = next(w for w in WIDTHS if w >= count)
            padded, following = np.full((2, width), 7, np.int32)
            padded[:count] = ids[at : at + count]
            after = ids[at + 1 : at + count + 1]
            following[: len(after)] = after
            self._hold(row, at, count)
            self.pool, found, chunk_scores = run(
                prefill,
                self.program,
                self.model.params,
                None,
                self.pool,
                padded,
                np.int32(at),
                np.int32(count),
                np.int32(-1),
                self.tables[:, row].copy(),  # a program that still runs may read the host's own memory
                None,
                soft,
                following if scored else None,
            )
            scores.append(chunk_scores)
            at += count
        assert at == len(ids)
        self.lengths[row] = at
        return np.asarray(found), scores

    def decode_arguments(self, step: np.ndarray) -> tuple[Any, ...]:
        rows = len(self.lengths)
        return self.model.params, None, self.pool, step, self.lengths, np.full(rows, -1, np.int32), self.tables.copy()

    def decode(self, step: np.ndarray) -> np.ndarray:
        for row in np.flatnonzero(self.lengths >= 0):
            self._hold(row, self.lengths[row], 1)
        self.pool, found = run(decode, self.program, *self.decode_arguments(step))
        self.lengths = np.where(self.lengths >= 0, self.lengths + 1, -1).astype(np.int32)
        return np.asarray(found)


CHUNKS = [(16, 3, 11), (4, 1), (13,)]  # of rows 0, 1 and 3; row 2 is empty
ROWS = (0, 1, 3)


def check(server: Server, oracle: Any) -> None:
    """Three prompts side by side and five decode steps against whole sequences; `oracle(ids)` gives their logits."""
    lengths = [sum(sizes) for sizes in CHUNKS]
    ids = tokens(len(ROWS), max(lengths) + 5, seed=3)
    expected = oracle(ids)
    for i, (row, sizes) in enumerate(zip(ROWS, CHUNKS, strict=True)):
        found, _ = server.prefill(row, ids[i, : lengths[i]], sizes)
        assert_close(found[0], expected[i, lengths[i] - 1], TIGHT)
    for step in range(5):
        now = np.zeros(4, np.int32)
        for i, row in enumerate(ROWS):
            now[row] = ids[i, lengths[i] + step]
        found = server.decode(now)
        assert found.shape == (4, VOCAB) and found.dtype == np.float32
        assert np.isfinite(found).all()
        for i, row in enumerate(ROWS):
            assert_close(found[row], expected[i, lengths[i] + step], TIGHT)


@pytest.mark.parametrize(
    ("family", "page_tokens"),
    [
        pytest.param("llama31", 16, marks=SLOW),
        ("qwen3", 5),
        ("gemma2", 3),
        ("gemma3", 4),
        pytest.param("mistral", 1, marks=SLOW),
    ],
)
def test_pages_give_what_transformers_gives(family: str, page_tokens: int) -> None:
    """Windows of 7 are much shorter than the sequences: their early pages are gone by then."""
    server = Server(load(family), 4, page_tokens)
    check(server, lambda ids: logits(tiny(family)[0], ids))
    windows = {group.window for group in server.shape.groups}
    assert (windows != {None}) == bool((server.tables[:, 0, 0] == 0).any())


def test_greedy_tokens_are_transformers() -> None:
    hf, _ = tiny("gemma3")
    prompt = tokens(1, 19, seed=8)[0]
    expected = hf.generate(
        torch.from_numpy(prompt[None].astype(np.int64)),
        attention_mask=torch.ones(1, 19),
        max_new_tokens=12,
        do_sample=False,
    )
    server = Server(load("gemma3"), 4, 4)
    found = [int(server.prefill(0, prompt, (16, 3))[0].argmax())]
    while len(found) < 12:
        found.append(int(server.decode(np.array([found[-1], 0, 0, 0], np.int32))[0].argmax()))
    new = expected[0, len(prompt) :].tolist()  # ends early with EOS
    assert found[: len(new)] == new


@pytest.mark.parametrize("quant", ["int8", pytest.param("nf4", marks=SLOW)])
def test_a_quantised_base(quant: str) -> None:
    model = load("llama31", quant=quant)
    check(Server(model, 4, 8), lambda ids: np.asarray(model(ids)))


# Eight query heads on two KV heads: on tensor=4 each KV head serves two devices.
HEADS = dict(num_attention_heads=8, num_key_value_heads=2)


@pytest.mark.parametrize("mesh", [pytest.param("tensor=2", marks=SLOW), "tensor=4"])
def test_several_devices_equal_one(mesh: str) -> None:
    check(Server(load("gemma3", mesh, **HEADS), 4, 4), lambda ids: logits(tiny("gemma3", **HEADS)[0], ids))


def exchanged(mesh: str, layers: int) -> Any:
    model = load("llama3", mesh, **HEADS, num_hidden_layers=layers)
    server = Server(model, 4, 4)
    compiled = decode.lower(*server.decode_arguments(np.zeros(4, np.int32)), program=server.program).compile(FAST)
    return collectives(compiled.as_text())


@pytest.mark.parametrize("mesh", [pytest.param("tensor=2", marks=SLOW), "tensor=4"])
def test_decode_exchanges_two_sums_a_layer(mesh: str) -> None:
    """Those of o_proj and down_proj; pages, keys, queries and attention stay where they are."""
    added = exchanged(mesh, 3) - exchanged(mesh, 2)
    axes = sum(size > 1 for size in load("llama3", mesh, **HEADS, num_hidden_layers=2).layout.mesh.shape.values())
    assert {item.kind for item in added} == {"all-reduce"}, added
    # Sums over both parts of the tensor axis may be one exchange or two.
    assert 2 <= added.total() <= 2 * axes, added
    assert all(item.bytes == 4 * 32 * 4 for item in added), added  # [4 rows, 32 wide] in fp32


def temporary(pages: int, dtype: Any = jnp.float32) -> tuple[int, int]:
    """(bytes of temporaries, bytes of the pool) of a decode step."""
    model = load("gemma3")
    server = Server(model, 4, 4)
    params, active, _, *rest = server.decode_arguments(np.zeros(4, np.int32))
    pool = jax.ShapeDtypeStruct((pages, 1, server.shape.elements), dtype)
    compiled = decode.lower(params, active, pool, *rest, program=server.program).compile()
    return compiled.memory_analysis().temp_size_in_bytes, pool.size * pool.dtype.itemsize


def test_there_is_one_pool() -> None:
    """It is updated in place: neither a layer nor a round of attention copies it."""
    (small, _), (large, pool) = temporary(100), temporary(100_000)
    assert large - small < pool / 1000
    server = Server(load("gemma3"), 4, 4)
    before = server.pool
    server.prefill(0, tokens(1, 4)[0], (4,))
    assert before.is_deleted()


def test_soft_prompts_take_the_first_positions() -> None:
    """transformers with inputs_embeds; the prefix ends inside a later chunk, and its tokens are not read."""
    hf, _ = tiny("gemma3")
    prefix = np.random.default_rng(0).normal(0, 0.5, (6, 32)).astype(np.float32)
    ids = np.concatenate([np.full(6, 5, np.int32), tokens(1, 12, seed=4)[0]])
    with torch.no_grad():
        embedded = hf.get_input_embeddings()(torch.from_numpy(ids.astype(np.int64))[None])
        embedded[0, :6] = torch.from_numpy(prefix)
        expected = hf(inputs_embeds=embedded).logits.numpy()[0]
    server = Server(load("gemma3"), 1, 4)
    padded = SoftPrompt(np.pad(prefix, ((0, 3), (0, 0)), constant_values=9.0), np.int32(6))
    found, _ = server.prefill(0, ids, (4, 10, 4), padded)
    assert_close(found[0], expected[-1], TIGHT)


def test_prompt_scores(monkeypatch) -> None:
    monkeypatch.setattr("jora.serve.device.programs.SCORED", 3)
    ids = tokens(1, 15, seed=5)[0]
    wide = torch.log_softmax(torch.from_numpy(logits(tiny("qwen3")[0], ids[None])[0]).double(), -1).numpy()
    _, scores = Server(load("qwen3"), 1, 4).prefill(0, ids, (11, 4), scored=True)
    at = 0
    for chunk, count in zip(scores, (11, 4), strict=True):
        for i in range(count if at + count < 15 else count - 1):
            log, token = wide[at + i], ids[at + i + 1]
            assert chunk.token[i] == token
            np.testing.assert_allclose(chunk.logprob[i], log[token], atol=1e-3)
            assert chunk.rank[i] == 1 + (log > log[token]).sum()
            best = np.argsort(-log)[:20]
            assert chunk.top[i].tolist() == best.tolist()
            np.testing.assert_allclose(chunk.top_logprobs[i], log[best], atol=1e-3)
        at += count
    assert Server(load("qwen3"), 1, 4).prefill(0, ids, (15,))[1] == [None]


def test_prompt_scores_never_hold_all_logits() -> None:
    """The widest array of a scored chunk is that of a few positions."""
    model, width = load("qwen3", vocab_size=300), 256  # a size that nothing else has
    server = Server(model, 1, 4)
    text = (
        prefill.lower(
            model.params,
            None,
            server.pool,
            np.zeros(width, np.int32),
            np.int32(0),
            np.int32(width),
            np.int32(-1),
            server.tables[:, 0],
            None,
            None,
            np.zeros(width, np.int32),
            program=server.program,
        )
        .compile(FAST)
        .as_text()
    )
    padded = model.config.padded_vocab
    assert f"[1,32,{padded}]" in text or f"[32,{padded}]" in text
    assert f"[1,{width},{padded}]" not in text and f"[{width},{padded}]" not in text


def test_meshes_other_than_tensor_are_refused() -> None:
    model = load("llama3", str(MeshSpec(fsdp=2)), **HEADS)
    with pytest.raises(jora.errors.InputError, match="fsdp"):
        PoolLayout.of(model.config, model.layout, jnp.float32, 4)
