"""The layer-wise step against the ordinary one, and what of its gradients exists at a time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.methods.test_full import assert_equal, leaves
from tests.tiny import VOCAB, tiny

from jora.data.batches import Shape
from jora.methods.full import Full
from jora.models.families import config_from_hf
from jora.models.head import Answers
from jora.models.model import Model, load_model
from jora.models.tensors import linear_shape
from jora.optim.projection import Side
from jora.sharding import single_device
from jora.train import TrainOptions
from jora.train.estimation import abstract_programs
from jora.train.optimizer import optimizer_for
from jora.train.step import MicroBatches, Program, TrainState, gradients, train_step

ROWS, LENGTH, ANSWERS = 4, 12, 5
METHOD = Full()


@pytest.fixture(scope="module")
def model() -> Model:
    """A tied table."""
    return load_model(tiny("llama31")[1], dtype="float32")


def batch(parts: int, step: int) -> MicroBatches:
    draw = np.random.default_rng(step)

    def numbers(below: int, length: int) -> np.ndarray:
        return draw.integers(0, below, (ROWS, length)).astype(np.int32).reshape(parts, ROWS // parts, length)

    tokens = numbers(VOCAB, LENGTH)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    weights = draw.random((parts, ROWS // parts, ANSWERS)).astype(np.float32)
    answers = Answers(numbers(LENGTH, ANSWERS), numbers(VOCAB, ANSWERS), weights)
    return MicroBatches(tokens, positions, None, answers, np.arange(ROWS, dtype=np.int32).reshape(parts, -1))


def run(model: Model, parts: int = 1, steps: int = 2, method: Full = METHOD, **changes: Any) -> tuple[Any, list[Any]]:
    """(weights, metrics) after some steps."""
    # A large epsilon: else Adam makes whole steps of gradients that are all rounding.
    settings: dict[str, Any] = dict(learning_rate=0.05, warmup=0.0, epsilon=1e-3, weight_decay=0.1, galore_rank=4)
    settings |= dict(galore_svd="exact", galore_projection="float32", galore_refresh=2)
    options = TrainOptions(accumulation=parts, **{**settings, **changes})
    trained = jax.tree.map(jnp.copy, method.init(model, jax.random.key(0)).state.trained)
    optimizer = optimizer_for(method, options, 10, model.config, model.layout, trained)
    state = TrainState(trained, optimizer.init(trained), jnp.int32(0))
    program = Program(model.config, model.layout, method, optimizer, "none")
    metrics = []
    for step in range(steps):
        seed = jnp.uint32(0)
        state, found = train_step(state, {}, method.rest(model.params), batch(parts, step), seed, program=program)
        metrics.append({name: float(value) for name, value in found.items()})
    return state, metrics


@pytest.fixture(scope="module")
def clipped(model: Model) -> tuple[Any, list[Any]]:
    """Layer-wise GaLore, clipped by the exact norm in two passes: the gradient's is far above."""
    return run(model, optimizer="galore", max_grad_norm=0.1, layerwise=True)


def test_it_is_the_ordinary_update(model: Model, clipped: tuple[Any, list[Any]]) -> None:
    layerwise, found = clipped
    ordinary, expected = run(model, optimizer="galore", max_grad_norm=0.1)
    assert expected[0]["grad_norm"] > 0.2
    assert_equal(ordinary.trained, layerwise.trained, 1e-6)
    assert_equal(ordinary.optimizer.output, layerwise.optimizer.output, 1e-6)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    start = leaves(model.params)
    assert all(np.abs(value - start[name]).max() > 1e-3 for name, value in leaves(layerwise.trained).items())


@pytest.mark.slow
def test_in_one_pass_without_clipping_and_with_frozen_weights(model: Model) -> None:
    method = Full(weights=["q_proj", "down_proj", "embed_tokens"])
    ordinary, expected = run(model, method=method, max_grad_norm=0.0, optimizer="adamw8bit")
    layerwise, found = run(model, method=method, max_grad_norm=0.0, optimizer="adamw8bit", layerwise=True)
    assert_equal(ordinary.trained, layerwise.trained, 1e-6)
    assert found[1] == pytest.approx(expected[1], rel=1e-5)


def test_accumulation_projects_every_micro_batch_by_the_first_ones_vectors(model: Model) -> None:
    found, metrics = run(model, 2, 1, optimizer="galore", max_grad_norm=0.0, layerwise=True)
    layers = found.optimizer.layers
    method, parts = METHOD, batch(2, 0)
    trained = method.init(model, jax.random.key(0)).state.trained
    program = Program(model.config, model.layout, method, None, "none")  # type: ignore[arg-type]
    share = jax.jit(lambda one: gradients(trained, {}, method.rest(model.params), one, None, program))
    # `gradients` divides by its own batch's weights; a step divides by those of all of it.
    sums = [part.sum() for part in parts.answers.weights]
    each = [share(jax.tree.map(lambda x, i=i: x[i : i + 1], parts)) for i in range(2)]
    loss = sum(float(value) * total for (value, _), total in zip(each, sums, strict=True)) / sum(sums)
    assert metrics[0]["loss"] == pytest.approx(loss, rel=1e-5)
    for target, stack in trained.layers.weights.items():
        outputs = 1 if target in ("o_proj", "down_proj", "gate_proj", "up_proj") else 3 if target == "q_proj" else 2
        size = int(np.prod(stack.shape[stack.ndim - outputs :]))
        g = [
            np.asarray(gradient.layers.weights[target]).reshape(2, -1, size) * total / sum(sums)
            for (_, gradient), total in zip(each, sums, strict=True)
        ]
        if g[0].shape[1] > size:  # the outputs are the smaller side
            g = [part.swapaxes(1, 2) for part in g]
        mean = np.asarray(layers.inner.mu.weights[target]) * 10  # of the first step: a tenth of R
        for layer in range(2):
            vectors = np.linalg.svd(g[0][layer])[0][:, :4]
            r = vectors.T @ (g[0][layer] + g[1][layer])
            rows = mean[layer].reshape(4, -1) if mean.shape[1] == 4 else mean[layer].reshape(-1, 4).T
            signs = np.sign((r * rows).sum(1, keepdims=True))
            np.testing.assert_allclose(rows, signs * r, atol=1e-3 * np.abs(r).max(), err_msg=f"{target} {layer}")


def first_means(state: Any) -> Any:
    """Of the first step: a tenth of the gradients as the optimiser was given them."""
    moments = state.optimizer
    return moments.embed.mu, moments.layers.inner.mu, moments.output.mu


def test_accumulated_gradients_are_clipped_by_their_projected_norm(model: Model) -> None:
    free, (expected,) = run(model, 2, 1, optimizer="galore", max_grad_norm=0.0, layerwise=True)
    clipped, (found,) = run(model, 2, 1, optimizer="galore", max_grad_norm=0.05, layerwise=True, clip_projected=True)
    assert found == pytest.approx(expected)
    scale = 0.05 / found["grad_norm"]
    assert scale < 0.5
    assert_equal(first_means(clipped), jax.tree.map(lambda mean: mean * scale, first_means(free)), 1e-7)
    assert squared(first_means(clipped)) == pytest.approx((0.1 * 0.05) ** 2, rel=1e-4)


@pytest.mark.slow
def test_at_full_rank_accumulated_gradients_are_clipped_as_in_the_ordinary_step(model: Model) -> None:
    """Where P is square the projected norm is the exact one, and P R the gradient."""
    whole: dict[str, Any] = dict(optimizer="galore", galore_rank=32, max_grad_norm=0.1)
    ordinary, (expected,) = run(model, 2, 1, **whole)
    layerwise, (found,) = run(model, 2, 1, layerwise=True, clip_projected=True, **whole)
    assert expected["grad_norm"] > 0.2
    assert found == pytest.approx(expected, rel=1e-5)
    for group in ("embed", "output"):  # what is not projected: all of the update
        assert_equal(getattr(layerwise.optimizer, group), getattr(ordinary.optimizer, group), 1e-7)
    ours, theirs = layerwise.trained, ordinary.trained
    assert_equal(
        (ours.embed, ours.final_norm, ours.layers.norms), (theirs.embed, theirs.final_norm, theirs.layers.norms), 1e-6
    )
    for target, matrix in model.params.layers.weights.items():
        side = Side(matrix.shape[1:], len(linear_shape(model.config, target).in_shape), 32)
        grown = [
            jax.vmap(side.expand)(state.projectors[f"weights.{target}"], state.inner.mu.weights[target])
            for state in (layerwise.optimizer.layers, ordinary.optimizer.layers)
        ]
        np.testing.assert_allclose(*grown, atol=1e-6 * float(jnp.abs(grown[1]).max()) + 1e-8, err_msg=target)


def squared(tree: Any) -> float:
    return float(sum(np.square(np.asarray(leaf, np.float64)).sum() for leaf in jax.tree.leaves(tree)))


def test_the_projected_norm_is_below_the_exact_one(model: Model, clipped: tuple[Any, list[Any]]) -> None:
    _, projected = run(model, 1, 1, optimizer="galore", layerwise=True, clip_projected=True)
    exact = clipped[1][0]
    assert 0.3 * exact["grad_norm"] < projected[0]["grad_norm"] < exact["grad_norm"]
    assert projected[0]["loss"] == pytest.approx(exact["loss"])


@pytest.mark.slow
def test_gradients_of_one_layer_exist_at_a_time() -> None:
    """By the compiler's analysis: twice the layers add nothing but their kept inputs."""

    def temporaries(layers: int, layerwise: bool) -> int:
        hf = dict(model_type="llama", vocab_size=64, hidden_size=128, intermediate_size=256, num_attention_heads=4)
        hf |= dict(num_hidden_layers=layers, rms_norm_eps=1e-6, hidden_act="silu", rope_theta=1e4)
        options = TrainOptions(max_grad_norm=0.0, layerwise=layerwise, remat="full")
        programs = abstract_programs(config_from_hf(hf), single_device(), METHOD, options, jnp.float32)
        compiled = programs.compile_train(Shape(1, 16, 8), programs.program._replace(remat="full"))
        return int(compiled.memory_analysis().temp_size_in_bytes)

    one_layer = 4 * (4 * 128 * 128 + 3 * 128 * 256)
    few = temporaries(8, True)
    assert few < 6 * one_layer  # weights and two moments of a layer, old and new
    assert temporaries(16, True) - few < 0.2 * 8 * one_layer  # 8 kept inputs of 16 x 128 elements
    assert temporaries(8, False) > 8 * one_layer  # all layers' gradients
