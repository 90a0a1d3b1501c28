"""The answers' loss against plain cross-entropy over full logits in torch, value and gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jora.methods.lora import LoRAProjection
from jora.models import head
from jora.models.adapted import Bound, Rows
from jora.models.config import ModelConfig
from jora.models.families import config_from_hf
from jora.models.head import Answers, answer_loss
from jora.models.params import Params
from jora.sharding import single_device

ROWS, LENGTH, COUNT, WIDTH, VOCAB, RANK = 3, 13, 10, 16, 99, 2
SCALE = 0.7
BASE_CONFIG = config_from_hf(
    {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "intermediate_size": 8,
    }
)


def config(cap: float | None) -> ModelConfig:
    return dataclasses.replace(BASE_CONFIG, logit_cap=cap)


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return draw.standard_normal(shape).astype(np.float32)

    table = normal(BASE_CONFIG.padded_vocab, WIDTH)
    table[VOCAB:] *= 100.0  # were padding words part of the softmax, nothing below would agree
    weights = draw.random((ROWS, COUNT)).astype(np.float32)
    weights[0, 3:] = 0.0
    weights[2] = 0.0
    return {
        "hidden": normal(ROWS, LENGTH, WIDTH),
        "table": table,
        "a": normal(WIDTH, RANK),
        "b": normal(RANK, BASE_CONFIG.padded_vocab),
        # A position twice in a row: both must reach the same hidden state's gradient.
        "positions": np.sort(draw.integers(0, LENGTH, (ROWS, COUNT))).astype(np.int32),
        "targets": np.concatenate([draw.integers(0, VOCAB, (ROWS, COUNT - 1)), [[VOCAB - 1]] * ROWS], 1).astype(
            np.int32
        ),
        "weights": weights,
    }


def ours(arrays: dict[str, np.ndarray], trained: list[str], cap: float | None) -> tuple[Any, dict[str, Any], Any]:
    """(loss, gradients of `trained`, nll of every answer)."""
    answers = Answers(arrays["positions"], arrays["targets"], arrays["weights"])

    def loss(values: dict[str, Any]) -> Any:
        v = {**arrays, **values}
        projection = LoRAProjection(v["a"], v["b"], jnp.float32(SCALE))
        params = Params(jnp.zeros_like(v["table"]), (), jnp.zeros(WIDTH), v["table"])
        bound = Bound(head=projection)
        return answer_loss(params, config(cap), single_device(), v["hidden"], answers, bound, Rows())

    values = {name: jnp.asarray(arrays[name]) for name in trained}
    (total, nll), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(values)
    return float(total), {k: np.asarray(g) for k, g in gradients.items()}, np.asarray(nll)


def torchs(arrays: dict[str, np.ndarray], cap: float | None) -> tuple[float, dict[str, np.ndarray], np.ndarray]:
    v = {k: torch.tensor(arrays[k], dtype=torch.float64, requires_grad=True) for k in ("hidden", "table", "a", "b")}
    logits = v["hidden"] @ v["table"][:VOCAB].T + SCALE * (v["hidden"] @ v["a"]) @ v["b"][:, :VOCAB]
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    rows = torch.arange(ROWS)[:, None]
    chosen = logits[rows, torch.from_numpy(arrays["positions"]).long()]
    nll = torch.nn.functional.cross_entropy(
        chosen.reshape(-1, VOCAB), torch.from_numpy(arrays["targets"]).long().reshape(-1), reduction="none"
    ).reshape(ROWS, COUNT)
    total = (nll * torch.from_numpy(arrays["weights"]).double()).sum()
    total.backward()
    gradients = {k: x.grad.numpy() for k, x in v.items() if x.grad is not None}
    return float(total.detach()), gradients, nll.detach().numpy()


# 3 rows: chunks of 1, 2, 3 (the last with padding) and 10 answers.
@pytest.mark.parametrize(("chunk", "cap"), [(1, None), (6, 5.0), (10, None), (128, 5.0)])
def test_loss_and_gradients_equal_torchs(
    chunk: int, cap: float | None, arrays: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "CHUNK", chunk)
    total, gradients, nll = ours(arrays, ["hidden", "table", "a", "b"], cap)
    expected_total, expected, expected_nll = torchs(arrays, cap)
    assert total == pytest.approx(expected_total, rel=1e-5)
    np.testing.assert_allclose(nll, expected_nll, rtol=1e-5, atol=1e-5)
    for name, found in gradients.items():
        error = np.linalg.norm(found - expected[name]) / np.linalg.norm(expected[name])
        assert error < 1e-5, f"{name}: {error:.1e}"
    assert not gradients["hidden"][2].any()  # weights of 0


def test_the_value_without_a_gradient_is_the_same(arrays: dict[str, np.ndarray]) -> None:
    """Evaluation takes another path: no gradient is made."""
    answers = Answers(arrays["positions"], arrays["targets"], arrays["weights"])
    params = Params(jnp.zeros_like(arrays["table"]), (), jnp.zeros(WIDTH), jnp.asarray(arrays["table"]))
    bound = Bound(head=LoRAProjection(arrays["a"], arrays["b"], jnp.float32(SCALE)))
    total, nll = answer_loss(params, config(None), single_device(), arrays["hidden"], answers, bound, Rows())
    expected_total, _, expected_nll = torchs(arrays, None)
    assert float(total) == pytest.approx(expected_total, rel=1e-5)
    np.testing.assert_allclose(nll, expected_nll, rtol=1e-5, atol=1e-5)


def test_each_part_alone_has_the_gradient_it_has_among_others(arrays: dict[str, np.ndarray]) -> None:
    _, expected, _ = torchs(arrays, None)
    for trained in (["hidden"], ["table"], ["a", "b"]):
        for name, found in ours(arrays, trained, None)[1].items():
            np.testing.assert_allclose(found, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_frozen_table_gets_no_gradient(arrays: dict[str, np.ndarray]) -> None:
    """No array of the table's shape is added up when the table does not train; one is when it does."""
    answers = Answers(arrays["positions"], arrays["targets"], arrays["weights"])

    def loss(values: dict[str, Any]) -> Any:
        v = {**arrays, **values}
        params = Params(v["table"], (), jnp.zeros(WIDTH), None)
        return answer_loss(params, config(None), single_device(), v["hidden"], answers, Bound(), Rows())[0]

    def products(trained: str) -> list[tuple[int, ...]]:
        jaxpr = jax.make_jaxpr(jax.grad(loss))({trained: jnp.asarray(arrays[trained])})
        return [tuple(sorted(shape)) for shape in outputs(jaxpr.jaxpr, "dot_general")]

    table = tuple(sorted(arrays["table"].shape))
    assert table not in products("hidden")
    assert table in products("table")


def outputs(jaxpr: Any, primitive: str) -> list[tuple[int, ...]]:
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == primitive:
            found += [v.aval.shape for v in equation.outvars]
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += outputs(inner, primitive)
    return found


def test_logits_leave_the_padding_out(arrays: dict[str, np.ndarray]) -> None:
    params = Params(jnp.asarray(arrays["table"]), (), jnp.zeros(WIDTH), None)
    found = head.logits(params, config(None), single_device(), jnp.asarray(arrays["hidden"]), Bound(), Rows())
    assert found.shape == (ROWS, LENGTH, VOCAB)
    np.testing.assert_allclose(found, arrays["hidden"] @ arrays["table"][:VOCAB].T, rtol=1e-5, atol=1e-5)
