"""A bank gives each row its own job's adapter, at the cost of that adapter alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.tiny import VOCAB, tiny

import jora
from jora.errors import InputError
from jora.methods.bank import Bank, BankProjection, Kind, Spans, check_bankable, job_axis, put, stack, take
from jora.methods.flora import FLoRA
from jora.methods.lora import LoRA, LoRAProjection
from jora.methods.method import State
from jora.models import decoder, head
from jora.models.adapted import Dense, Rows, Site
from jora.models.model import Model
from jora.sharding import single_device

# Rank 3 twice, rank 1 on the ends of the model, and fLoRA, which scales what goes into the base's product.
METHODS = [
    LoRA(rank=3, targets=["q_proj", "down_proj"]),
    LoRA(rank=1, targets=["o_proj", "embed_tokens", "lm_head"]),
    FLoRA(rank=2, targets=["q_proj"]),
]
KINDS = (Kind(METHODS[0], 2, 2), Kind(METHODS[1], 1, 1), Kind(METHODS[2], 1, 1))


@pytest.fixture(scope="module")
def model() -> Model:
    """With a bias in q, k, v."""
    return jora.load_model(tiny("qwen2")[1], dtype="float32")


def random_adapter(method: Any, model: Model, seed: int) -> Any:
    adapter = method.init(model, jax.random.key(seed))
    draw = np.random.default_rng(seed)
    trained = jax.tree.map(lambda x: x + 0.2 * draw.standard_normal(x.shape).astype(np.float32), adapter.state.trained)
    return dataclasses.replace(adapter, state=State(trained, adapter.state.constant))


@pytest.fixture(scope="module")
def adapters(model: Model) -> list[Any]:
    return [random_adapter(m, model, i) for i, m in enumerate([METHODS[0], METHODS[0], METHODS[1], METHODS[2]])]


def bank_state(adapters: list[Any]) -> State:
    states = [stack([a.state for a in adapters[:2]]), stack([adapters[2].state]), stack([adapters[3].state])]
    return State(tuple(s.trained for s in states), tuple(s.constant for s in states))


@pytest.fixture(scope="module")
def bank_logits(model: Model) -> Any:
    bank = Bank(KINDS)

    @jax.jit
    def run(state: State, ids: Any) -> Any:
        rows = Rows()
        bound = bank.bind(state, rows)
        shared = (model.params, model.config, model.layout)
        hidden, _ = decoder.forward(*shared, ids, bound=bound, rows=rows)
        return head.logits(*shared, hidden, bound, rows)

    return run


IDS = np.random.default_rng(0).integers(0, VOCAB, (6, 9)).astype(np.int32)


def test_each_row_meets_its_own_adapter(model: Model, adapters: list[Any], bank_logits: Any) -> None:
    found = np.asarray(bank_logits(bank_state(adapters), IDS))
    jobs = Bank(KINDS).spans.jobs()
    assert jobs.tolist() == [0, 0, 1, 1, 2, 3]
    base = np.asarray(model(IDS))
    for job, adapter in enumerate(adapters):
        expected = np.asarray(model(IDS, adapter))[jobs == job]
        np.testing.assert_allclose(found[jobs == job], expected, rtol=0, atol=1e-5 * expected.std())
        assert np.abs(expected - base[jobs == job]).max() > 0.01  # the adapter does something


def test_a_broken_adapter_leaves_the_others_alone(adapters: list[Any], bank_logits: Any) -> None:
    state = bank_state(adapters)
    broken = jax.tree.map(lambda x: x.at[(slice(None),) * job_axis(x) + (1,)].set(jnp.nan), state.trained[0])
    found = np.asarray(bank_logits(State((broken, *state.trained[1:]), state.constant), IDS))
    expected = np.asarray(bank_logits(state, IDS))
    assert np.isnan(found[2:4]).all()
    np.testing.assert_array_equal(found[[0, 1, 4, 5]], expected[[0, 1, 4, 5]])


def test_split_and_join_on_devices() -> None:
    """Each of two devices holds a share of every job's rows."""
    spans = Spans(2, ((2, 1), (1, 3)))
    assert spans.rows == 10
    assert spans.jobs().tolist() == [0, 1, 2, 2, 2] * 2
    x = jnp.arange(10)[:, None]
    first, second = spans.split(x)
    assert first[..., 0].tolist() == [[0, 5], [1, 6]]
    assert second[..., 0].tolist() == [[2, 3, 4, 7, 8, 9]]
    np.testing.assert_array_equal(spans.join([first, second]), x)


def test_put_and_take() -> None:
    states = [{"a": jnp.full((3, 2), i), "n": jnp.int32(i)} for i in range(4)]
    stacked = stack(states)
    assert stacked["a"].shape == (3, 4, 2) and stacked["n"].shape == (4,)
    changed = put(stacked, 2, {"a": jnp.full((3, 2), 9), "n": jnp.int32(9)})
    assert [int(take(changed, i)["n"]) for i in range(4)] == [0, 1, 9, 3]
    assert take(changed, 2)["a"].tolist() == [[9, 9]] * 3 and take(changed, 1)["a"].tolist() == [[1, 1]] * 3


WIDTH, OUT, LENGTH = 96, 160, 24


def site_flops(ranks: list[int], rows: int) -> float:
    """Of the forward and backward pass of one site without the base's product, by the compiler's own count."""
    draw = np.random.default_rng(0)
    layout = single_device()
    spans = Spans(1, tuple((1, rows) for _ in ranks))

    def array(*shape: int) -> Any:
        return jnp.asarray(draw.standard_normal(shape), jnp.float32)

    parts = tuple(LoRAProjection(array(1, WIDTH, r), array(1, r, OUT), jnp.ones(1)) for r in ranks)
    x, weight = array(rows * len(ranks), LENGTH, WIDTH), array(WIDTH, OUT)

    def run(parts: Any, x: Any, weight: Any) -> Any:
        dense = Dense(weight, None, (None,), (None,), layout)
        bank = BankProjection(parts, spans)
        return jnp.sum(jnp.square(bank.apply(x, dense, Site("q_proj", jnp.int32(0)), Rows())))

    compiled = jax.jit(jax.grad(run, argnums=(0, 1))).lower(parts, x, weight).compile()
    tokens = rows * len(ranks) * LENGTH
    return compiled.cost_analysis()["flops"] - 4 * tokens * WIDTH * OUT


def test_cost_grows_with_the_sum_of_ranks() -> None:
    """Not with the jobs times the largest rank: 1 + 1 + 1 + 61 costs what 16 + 16 + 16 + 16 does."""
    even, mixed, double = site_flops([16] * 4, 2), site_flops([1, 1, 1, 61], 2), site_flops([32] * 4, 2)
    tokens_of_a_job = 2 * LENGTH
    products = 6 * tokens_of_a_job * (WIDTH + OUT) * 64  # forward, and twice as much backward
    elementwise = 0.12 * products
    for found in (even, mixed):
        assert products <= found <= products + elementwise
    assert double == pytest.approx(2 * even, rel=0.1)
    # The largest rank for all rows would cost this.
    assert mixed < 0.5 * (6 * 4 * tokens_of_a_job * (WIDTH + OUT) * 61)


def test_methods_that_need_the_base_for_themselves_are_refused(model: Model) -> None:
    check_bankable(LoRA(), model, "job a")
    with pytest.raises(InputError, match="job a: lora changes the base's own weights"):
        check_bankable(LoRA(modules_to_save=["lm_head"]), model, "job a")
    with pytest.raises(InputError, match="prompt of its own"):
        check_bankable(jora.PromptTuning(), model, "job a")
