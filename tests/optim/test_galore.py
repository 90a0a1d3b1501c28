"""GaLore against galore-torch, and what its projection promises."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from galore_torch import GaLoreAdamW
from galore_torch.galore_projector import GaLoreProjector

from jora.errors import InputError
from jora.optim import GaLore, galore, scale_by_adam, stacked
from jora.optim.adam import AdamState
from jora.optim.projection import Int8Columns, Side, leading_vectors, read, store

RANK, REFRESH, STEPS = 3, 80, 200
SHAPES = {"wide": (6, 10), "tall": (9, 5), "square": (7, 7)}  # [in, out]


def normal(*shape: int, seed: Any = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def gradient_of(target: np.ndarray, weight: np.ndarray, step: int) -> np.ndarray:
    """Of a quadratic with noise: it depends on the trajectory, so an error would grow."""
    return ((weight - target) * 0.1 + normal(*target.shape, seed=(7, step))).astype(np.float32)


@pytest.fixture
def fixed_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    """galore-torch with our sign of each singular vector: M and V outlive a refresh, so signs matter."""
    original = GaLoreProjector.get_orthogonal_matrix

    def signed(self: Any, weights: Any, rank: int, type: str) -> Any:
        vectors = original(self, weights, rank, type)
        columns = vectors.T if type == "right" else vectors
        largest = columns.abs().argmax(dim=0)
        columns = columns * torch.sign(columns[largest, torch.arange(columns.shape[1])])
        return columns.T if type == "right" else columns

    monkeypatch.setattr(GaLoreProjector, "get_orthogonal_matrix", signed)


@pytest.mark.parametrize("form", SHAPES)
def test_trajectory_equals_galore_torch(form: str, fixed_signs: None) -> None:
    shape, rate, alpha = SHAPES[form], 0.02, 0.25
    target, start = normal(*shape, seed=1), normal(*shape, seed=2)
    bias = normal(4, seed=3)
    theirs = torch.nn.Parameter(torch.from_numpy(start.T.copy()))  # torch: [out, in]
    their_bias = torch.nn.Parameter(torch.from_numpy(bias.copy()))
    groups = [
        {"params": [their_bias]},
        {"params": [theirs], "rank": RANK, "update_proj_gap": REFRESH, "scale": alpha, "proj_type": "std"},
    ]
    adamw = GaLoreAdamW(groups, lr=rate, eps=1e-8, no_deprecation_warning=True)
    optimizer = optax.chain(
        galore(scale_by_adam(), RANK, scale=alpha, refresh=REFRESH, stagger=False), optax.scale_by_learning_rate(rate)
    )
    ours = {"bias": jnp.asarray(bias), "weight": jnp.asarray(start)}
    state = optimizer.init(ours)
    update = jax.jit(optimizer.update)
    for step in range(STEPS):  # refreshes at 0, 80 and 160
        theirs.grad = torch.from_numpy(gradient_of(target, theirs.detach().numpy().T, step).T.copy())
        their_bias.grad = torch.from_numpy(normal(4, seed=(8, step)))
        gradients = {
            "bias": jnp.asarray(normal(4, seed=(8, step))),
            "weight": jnp.asarray(gradient_of(target, np.asarray(ours["weight"]), step)),
        }
        adamw.step()
        updates, state = update(gradients, state, ours)
        ours = optax.apply_updates(ours, updates)
    np.testing.assert_allclose(ours["weight"], theirs.detach().numpy().T, atol=2e-5)
    np.testing.assert_allclose(ours["bias"], their_bias.detach().numpy(), atol=2e-5)
    assert np.abs(np.asarray(ours["weight"]) - start).max() > 0.1


def test_full_rank_and_sgd_is_sgd() -> None:
    weight, g = normal(5, 8), normal(5, 8, seed=1)
    optimizer = galore(optax.identity(), 5, scale=1.0)
    updates, _ = optimizer.update(jnp.asarray(g), optimizer.init(jnp.asarray(weight)), jnp.asarray(weight))
    np.testing.assert_allclose(updates, g, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES.values())
def test_projection_is_the_best_of_its_rank(shape: tuple[int, int]) -> None:
    g = normal(*shape)
    side = Side(shape, 1, RANK)
    p = leading_vectors(side.as_columns(jnp.asarray(g)), RANK, "exact", 0)
    np.testing.assert_allclose(p.T @ p, np.eye(RANK), atol=1e-6)
    left = np.square(g - np.asarray(side.expand(p, side.project(p, jnp.asarray(g))))).sum()
    np.testing.assert_allclose(left, np.square(np.linalg.svd(g)[1][RANK:]).sum(), rtol=1e-5)


def test_the_randomised_factorisation_is_nearly_as_good() -> None:
    # Singular values that fall slowly, as those of gradients do.
    u, _ = np.linalg.qr(normal(96, 96))
    v, _ = np.linalg.qr(normal(160, 96, seed=1))
    g = (u * (1.0 / np.sqrt(np.arange(1, 97)))) @ v.T
    left = {}
    factorise = jax.jit(leading_vectors, static_argnums=(1, 2))
    for kind in ("exact", "randomised"):
        p = np.asarray(factorise(jnp.asarray(g), 24, kind, 3))
        np.testing.assert_allclose(p.T @ p, np.eye(24), atol=1e-5)
        left[kind] = np.square(g - p @ p.T @ g).sum()
    assert left["exact"] <= left["randomised"] <= 1.03 * left["exact"]
    np.testing.assert_array_equal(p, factorise(jnp.asarray(g), 24, "randomised", 3))


def test_a_transposed_twin_has_the_same_trajectory() -> None:
    weights = {"as_is": jnp.asarray(normal(6, 10)), "twin": jnp.asarray(normal(6, 10).T)}
    optimizer = galore(scale_by_adam(), RANK, refresh=4, stagger=False)
    state, update = optimizer.init(weights), jax.jit(optimizer.update)
    for step in range(9):
        g = normal(6, 10, seed=(4, step))
        updates, state = update({"as_is": jnp.asarray(g), "twin": jnp.asarray(g.T)}, state, weights)
        np.testing.assert_allclose(updates["as_is"], updates["twin"].T, atol=1e-5)


def test_heads_apart_is_the_same_matrix() -> None:
    """[in, heads, width] and [heads, width, out] are matrices whose axes stay apart."""
    g = normal(8, 12)
    plain = galore(scale_by_adam(), RANK)
    expected, _ = plain.update(jnp.asarray(g), plain.init(jnp.asarray(g)), jnp.asarray(g))
    for shape, inputs in (((8, 3, 4), 1), ((2, 4, 12), 2)):
        apart = galore(scale_by_adam(), RANK, matrices=lambda path, shape, n=inputs: n)
        weight = jnp.asarray(g.reshape(shape))
        found, _ = apart.update(weight, apart.init(weight), weight)
        np.testing.assert_allclose(np.asarray(found).reshape(8, 12), expected, atol=1e-6)


def test_a_stack_is_its_layers_and_refreshes_are_spread() -> None:
    layers, refresh = 4, 8
    stack = jnp.asarray(normal(layers, 6, 10))
    inner = GaLore(scale_by_adam(), RANK, refresh_every=refresh, layers=layers)
    together = stacked(inner)
    state = together.init(stack)
    update = jax.jit(together.update)
    changes = []
    for step in range(2 * refresh + 1):
        before = np.asarray(state.projectors[""])
        means = np.asarray(state.inner.mu)
        g = normal(layers, 6, 10, seed=(5, step))
        _, state = update(jnp.asarray(g), state, stack)
        after = np.asarray(state.projectors[""])
        changes.append([layer for layer in range(layers) if (before[layer] != after[layer]).any()])
        # Moments are carried over a refresh as they are.
        r = np.einsum("lir,lio->lro", after, g)
        np.testing.assert_allclose(state.inner.mu, 0.9 * means + 0.1 * r, atol=1e-5)
    assert changes[0] == [0, 1, 2, 3]
    assert all(len(changed) <= 1 for changed in changes[1:])
    assert sorted(layer for changed in changes[1 : refresh + 1] for layer in changed) == [0, 1, 2, 3]
    alone = galore(scale_by_adam(), RANK, refresh=refresh, stagger=False)
    g = normal(layers, 6, 10, seed=6)
    first, _ = together.update(jnp.asarray(g), together.init(stack), stack)
    for layer in range(layers):
        one, _ = alone.update(jnp.asarray(g[layer]), alone.init(stack[layer]), stack[layer])
        np.testing.assert_allclose(first[layer], one, atol=1e-6)


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_a_rounded_projection(precision: Any) -> None:
    vectors = leading_vectors(jnp.asarray(normal(64, 80)), 16, "exact", 0)
    kept = store(vectors, precision)
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(kept))
    assert stored == (64 * 16 * 2 if precision == "bfloat16" else 64 * 16 + 16 * 4)
    assert isinstance(kept, Int8Columns) == (precision == "int8")
    back = np.asarray(read(kept), np.float32)
    np.testing.assert_allclose(back, vectors, atol=np.abs(vectors).max() / (256 if precision == "bfloat16" else 250))
    np.testing.assert_allclose(back.T @ back, np.eye(16), atol=0.02)


def test_any_base_optimiser_sees_the_projected_gradient() -> None:
    g = normal(6, 10)
    inner = optax.trace(0.9)
    optimizer = galore(inner, RANK, scale=2.0)
    state = optimizer.init(jnp.asarray(g))
    assert state.inner.trace.shape == (RANK, 10)
    updates, state = optimizer.update(jnp.asarray(g), state, jnp.asarray(g))
    p = np.asarray(state.projectors[""])
    np.testing.assert_allclose(state.inner.trace, p.T @ g, atol=1e-6)
    np.testing.assert_allclose(updates, 2 * p @ (p.T @ g), atol=1e-5)


def test_projected_micro_batches_add_up() -> None:
    parts = [jnp.asarray(normal(6, 10, seed=s)) for s in range(3)]
    method = GaLore(scale_by_adam(), RANK)
    state = method.refresh(parts[0], method.init(parts[0]))
    total = sum(method.project(part, state) for part in parts)
    np.testing.assert_allclose(total, method.project(sum(parts), state), atol=1e-5)


def test_a_rank_above_the_matrix_is_refused() -> None:
    with pytest.raises(InputError, match=r"GaLore: rank 7 is above the smaller side of a\.b, 6"):
        galore(scale_by_adam(), 7).init({"a": {"b": jnp.zeros((6, 10))}})


def test_an_update_without_parameters_is_refused() -> None:
    optimizer, weight = galore(scale_by_adam(), 2), jnp.ones((6, 10))
    with pytest.raises(InputError, match="give the parameters too"):
        optimizer.update(weight, optimizer.init(weight))


def test_it_resumes_bit_for_bit() -> None:
    weights = jnp.asarray(normal(6, 10))
    optimizer = galore(scale_by_adam(moments="int8"), RANK, refresh=4, precision="int8")
    update = jax.jit(optimizer.update)

    def run(state: Any, steps: range) -> Any:
        for step in steps:
            updates, state = update(jnp.asarray(normal(6, 10, seed=(9, step))), state, weights)
        return updates, state

    whole, _ = run(optimizer.init(weights), range(7))
    _, half = run(optimizer.init(weights), range(3))  # in the middle of an interval
    host = jax.tree.map(np.asarray, half)
    resumed, _ = run(jax.tree.map(jnp.asarray, host), range(3, 7))
    np.testing.assert_array_equal(whole, resumed)
    assert isinstance(half.inner, AdamState)
