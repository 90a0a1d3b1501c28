"""The train step: what must not change its result, and what it must not compute."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.tiny import VOCAB, tiny

import jora
from jora.data.batches import Shape
from jora.methods.lora import LoRA
from jora.methods.method import State
from jora.models.config import LINEARS
from jora.models.families import config_from_hf
from jora.models.head import Answers
from jora.models.model import Model
from jora.sharding import single_device
from jora.train.estimation import abstract_programs
from jora.train.flops import matmul_flops
from jora.train.optimizer import make_optimizer
from jora.train.options import TrainOptions
from jora.train.remat import POLICIES
from jora.train.step import MicroBatches, Program, batch_loss, fold_all, gradients

METHOD = LoRA(rank=3, targets="all-linear", dropout=0.2)
ROWS, LENGTH, ANSWERS = 6, 11, 4


@pytest.fixture(scope="module")
def model() -> Model:
    """Windows, norms of q and k, a tied table."""
    return jora.load_model(tiny("gemma3", num_hidden_layers=2, layer_types=KINDS)[1], dtype="float32")


KINDS = ["sliding_attention", "full_attention"]


@pytest.fixture(scope="module")
def state(model: Model) -> State:
    """B is not zero, so that every factor has a gradient."""
    state = METHOD.init(model, jax.random.key(0)).state
    leaves, structure = jax.tree.flatten(state.trained)
    draw = np.random.default_rng(0)
    trained = [jnp.asarray(0.1 * draw.standard_normal(leaf.shape), jnp.float32) for leaf in leaves]
    return State(jax.tree.unflatten(structure, trained), state.constant)


def batch(parts: int = 1) -> MicroBatches:
    """The same six rows in `parts` micro-batches, with unequal weights: a third of the answers is padding."""
    draw = np.random.default_rng(1)

    def numbers(below: int, *shape: int) -> np.ndarray:
        return draw.integers(0, below, shape).astype(np.int32).reshape(parts, ROWS // parts, *shape[1:])

    tokens = numbers(VOCAB, ROWS, LENGTH)
    answers = (numbers(LENGTH, ROWS, ANSWERS), numbers(VOCAB, ROWS, ANSWERS))
    weights = draw.random((ROWS, ANSWERS)) * (np.arange(ROWS * ANSWERS) % 3 > 0).reshape(ROWS, ANSWERS)
    weights[:3] *= 5  # the halves of the batch weigh differently
    weights = weights.astype(np.float32).reshape(answers[0].shape)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    ids = np.arange(ROWS, dtype=np.int32).reshape(parts, -1)
    return MicroBatches(tokens, positions, None, Answers(*answers, weights), ids)


def compute(model: Model, state: State, batches: MicroBatches, remat: Any = "none") -> tuple[float, Any]:
    program = Program(model.config, model.layout, METHOD, None, remat)  # type: ignore[arg-type]
    seeds = fold_all(7, 0, batches.row_ids)
    run = jax.jit(lambda trained: gradients(trained, state.constant, model.params, batches, seeds, program))
    loss, found = run(state.trained)
    return float(loss), jax.tree.map(np.asarray, found)


@pytest.fixture(scope="module")
def whole(model: Model, state: State) -> tuple[float, Any]:
    return compute(model, state, batch())


def assert_same(found: tuple[float, Any], expected: tuple[float, Any], tolerance: float = 1e-5) -> None:
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(found[1]), jax.tree.leaves(expected[1]), strict=True):
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        assert error <= tolerance, f"{jax.tree_util.keystr(path)} differs by {error:.1e} of its norm"


@pytest.mark.parametrize("parts", [2, 6])
def test_accumulation_equals_the_large_batch(parts: int, model: Model, state: State, whole: Any) -> None:
    assert_same(compute(model, state, batch(parts)), whole)


def test_accumulation_is_keyed_by_the_rows_numbers(model: Model, state: State, whole: Any) -> None:
    """The comparison above would miss a dropout that is not drawn at all, or not by row."""
    other = batch()._replace(row_ids=np.arange(1, ROWS + 1, dtype=np.int32)[None])
    assert abs(compute(model, state, other)[0] - whole[0]) > 1e-4 * whole[0]


def test_padding_changes_nothing(model: Model, state: State, whole: Any) -> None:
    """Two rows without loss, five more tokens in every row, three more answers of weight 0."""

    def pad(x: np.ndarray, *more: int) -> np.ndarray:
        width = ((0, 0), (0, 2), *((0, n) for n in more))
        return np.concatenate([np.pad(x, width, constant_values=x.dtype.type(0))])

    plain = batch()
    positions = np.broadcast_to(np.arange(LENGTH + 5, dtype=np.int32), (1, ROWS + 2, LENGTH + 5))
    answers = Answers(*(pad(x, 3) for x in plain.answers))
    padded = MicroBatches(pad(plain.tokens, 5), positions, None, answers, pad(plain.row_ids))
    assert_same(compute(model, state, padded), whole)


def test_packed_rows_equal_rows_of_their_own(model: Model, state: State) -> None:
    """Two examples in one row, kept apart by segments, without dropout (which is keyed by the row)."""
    plain = batch()
    program = Program(model.config, model.layout, METHOD, None, "none")  # type: ignore[arg-type]

    def loss(batches: MicroBatches) -> tuple[float, Any]:
        def run(trained: Any) -> Any:
            return gradients(trained, state.constant, model.params, batches, None, program)

        value, found = jax.jit(run)(state.trained)
        return float(value), jax.tree.map(np.asarray, found)

    def join(x: np.ndarray) -> np.ndarray:
        return x.reshape(1, ROWS // 2, -1)

    shift = np.array([0, LENGTH] * (ROWS // 2), np.int32)[None, :, None]
    answers = Answers(*map(join, plain.answers._replace(positions=plain.answers.positions + shift)))
    segments = np.repeat(np.array([1, 2], np.int32), LENGTH)[None, None].repeat(ROWS // 2, 1)
    packed = MicroBatches(join(plain.tokens), join(plain.positions), segments, answers, plain.row_ids[:, ::2])
    assert_same(loss(packed), loss(plain))


@pytest.mark.parametrize("remat", [policy for policy in POLICIES if policy != "none"])
def test_rematerialisation_changes_no_gradient(remat: Any, model: Model, state: State, whole: Any) -> None:
    assert_same(compute(model, state, batch(), remat), whole)


def test_a_fresh_adapter_is_the_base_and_only_b_moves(model: Model) -> None:
    fresh = LoRA(rank=3, targets=[*LINEARS, "lm_head"]).init(model, jax.random.key(0))
    ids = batch().tokens[0]
    np.testing.assert_array_equal(np.asarray(model(ids, fresh)), np.asarray(model(ids)))
    program = Program(model.config, model.layout, fresh.method, None, "none")  # type: ignore[arg-type]

    def run(trained: Any) -> Any:
        return gradients(trained, fresh.state.constant, model.params, batch(), None, program)[1]

    for target, factors in jax.jit(run)(fresh.state.trained).items():
        assert not np.any(factors["a"]), f"dL/dA of {target} is not 0"
        # All layers: a zero in the middle of the stack would pass np.any of the whole.
        assert np.all(np.any(np.asarray(factors["b"]).reshape(-1, factors["b"].shape[-1]), axis=-1)), target


WIDE = config_from_hf(
    {
        "model_type": "llama",
        "vocab_size": 1000,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "intermediate_size": 704,
    }
)


def dots(jaxpr: Any) -> list[tuple[int, ...]]:
    """Shapes that matrix products put out, loops and calls included."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append(equation.outvars[0].aval.shape)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += dots(inner)
    return found


def test_frozen_weights_get_no_gradient() -> None:
    """No product of a weight's shape in the step, and at most two thirds of full fine-tuning's work."""
    method = LoRA(rank=4)
    programs = abstract_programs(WIDE, single_device(), method, TrainOptions(), jnp.float32)
    program = programs.program._replace(remat="none")
    # 96 answers of 96 tokens: the head costs what it would cost in full.
    rows, length = 2, 96
    lora = programs.trace_train(Shape(rows, length, length), program).jaxpr
    weights = {tuple(sorted(leaf.shape[1:])) for leaf in programs.params.layers.weights.values()} | {
        tuple(sorted(programs.params.embed.shape))
    }
    assert not [shape for shape in dots(lora.jaxpr) if tuple(sorted(shape)) in weights]

    def full(params: Any, constant: Any, trained: Any, batches: MicroBatches) -> Any:
        one = jax.tree.map(lambda leaf: leaf[0], batches)
        return jax.grad(lambda p: batch_loss(trained, constant, p, one, None, program)[0])(params)

    from jora.train.feed import abstract_batches

    batches = abstract_batches(Shape(rows, length, length), 1, program.layout, packed=False)
    traced = jax.jit(full).trace(programs.params, programs.constant, programs.state.trained, batches).jaxpr
    assert [shape for shape in dots(traced.jaxpr) if tuple(sorted(shape)) in weights]  # the check can fail
    assert matmul_flops(lora) <= 0.7 * matmul_flops(traced)


def test_the_optimizer_is_shared_by_equal_options() -> None:
    """Programs are static arguments: another object would compile the step again."""
    assert make_optimizer(TrainOptions(epochs=2), 10) is make_optimizer(TrainOptions(), 10)
