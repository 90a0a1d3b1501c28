"""NOLA: what it computes, its gradients, and what starts at zero, against explicit bases and plain LoRA."""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.inference.characters import talking
from tests.methods.peft_oracle import base
from tests.tiny import VOCAB, tokens

import jora
from jora.data.formats import parse_example
from jora.inference import evaluate as evaluation
from jora.inference import tokens as generation
from jora.kernels.counter_hash import fold_all
from jora.kernels.random_basis import basis, basis_keys, uniform
from jora.methods.lora import LoRA
from jora.methods.method import Adapter, State
from jora.methods.nola import NOLA, target_number
from jora.models.adapted import Rows
from jora.models.families import config_from_hf
from jora.models.head import Answers
from jora.models.model import Model
from jora.models.params import abstract_params
from jora.sharding import single_device
from jora.train.step import MicroBatches, Program, batch_loss

# q_proj and gate_proj share a factor's shape; heads, MLP and vocabulary are each cut in their own way.
TARGETS = ["q_proj", "gate_proj", "down_proj", "lm_head"]
METHOD = NOLA(rank=3, bases=10, alpha=6, targets=TARGETS, dropout=0.2, basis_seed=5)
UNIQUE = dataclasses.replace(METHOD, basis="unique")
PURE = dataclasses.replace(METHOD, variant="pure")
FAST = {"xla_backend_optimization_level": "0"}


def random_nola(model: Model, method: NOLA, seed: int = 0) -> Adapter:
    """An adapter with random coefficients in place of the first zeros."""
    fresh = method.init(model, jax.random.key(0))
    draw = np.random.default_rng(seed)
    leaves, structure = jax.tree.flatten(fresh.state.trained)
    drawn = [jax.device_put(0.5 * draw.standard_normal(x.shape).astype(np.float32), x.sharding) for x in leaves]
    return dataclasses.replace(fresh, state=State(jax.tree.unflatten(structure, drawn), fresh.state.constant))


def batch(rows: int = 4, length: int = 12) -> MicroBatches:
    """One micro-batch (leaves without m)."""
    draw = np.random.default_rng(0)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    answers = Answers(
        draw.integers(0, length, (rows, 5)).astype(np.int32),
        draw.integers(0, VOCAB, (rows, 5)).astype(np.int32),
        draw.random((rows, 5)).astype(np.float32),
    )
    ids = draw.integers(0, VOCAB, (rows, length)).astype(np.int32)
    return MicroBatches(ids, positions, None, answers, np.arange(rows, dtype=np.int32))


def loss_and_gradient(model: Model, adapter: Adapter) -> tuple[float, Any]:
    """Of one batch with dropout, on the host."""
    program = Program(model.config, model.layout, adapter.method, None, "none")  # type: ignore[arg-type]
    # Committed, as every random adapter is: else the same program is compiled again.
    state = jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding), adapter.state)
    value, found = _run(state.trained, state.constant, model.params, batch(), program=program)
    return float(value), jax.tree.map(np.asarray, found)


@partial(jax.jit, static_argnames="program", compiler_options=FAST)
def _run(trained: Any, constant: Any, params: Any, given: MicroBatches, *, program: Program) -> Any:
    seeds = fold_all(7, given.row_ids)
    return jax.value_and_grad(lambda t: batch_loss(t, constant, params, given, seeds, program)[0])(trained)


def explicit(method: NOLA, side: str, target: str, layer: int, units: int) -> np.ndarray:
    """All bases of one factor, float64 [k, units, r], over sqrt(k)."""
    stream = (target_number(target), layer) if method.basis == "unique" else ()
    keys = basis_keys(method.basis_seed, method.bases, "ab".index(side), *stream)
    elements = np.arange(units * method.rank, dtype=np.uint32).reshape(units, method.rank)
    return np.asarray(basis(keys, jnp.asarray(elements)), np.float64)[: method.bases] / np.sqrt(method.bases)


def offset(method: NOLA, target: str, layer: int, units: int) -> np.ndarray:
    """A0 [units, r], U(-1/sqrt(in), 1/sqrt(in))."""
    if method.variant == "pure":
        return np.zeros((units, method.rank))
    key = fold_all(method.basis_seed, 2, target_number(target), layer)[None]
    return np.asarray(uniform(key, jnp.arange(units * method.rank)), np.float64).reshape(units, -1) / np.sqrt(units)


def sites(method: NOLA, model: Model) -> Any:
    """(target, its row of coefficients, its layer or None), one by one."""
    for target, by_layer in method.sites(model.config).items():
        for row, layer in enumerate(by_layer):
            yield target, row, layer


@pytest.mark.parametrize("method", [METHOD, UNIQUE, PURE])
def test_loss_and_gradient_against_lora_and_explicit_bases(method: NOLA) -> None:
    """The loss is LoRA's with the same A and B, dropout included; da_i = <dL/dA, A_i> of LoRA's own backward pass."""
    model = base("llama3")
    adapter = random_nola(model, method)
    lora = adapter.method.to_lora(adapter)
    assert isinstance(lora.method, LoRA)
    value, found = loss_and_gradient(model, adapter)
    lora_value, dense = loss_and_gradient(model, lora)
    assert value == pytest.approx(lora_value, rel=1e-5)
    for target, row, layer in sites(method, model):
        for side in "ab":
            index = () if layer is None else (layer,)
            factor, slope = (np.asarray(tree[target][side], np.float64)[index] for tree in (lora.state.trained, dense))
            if side == "b":  # [r, *out] -> [units, r]
                factor, slope = (x.reshape(method.rank, -1).T for x in (factor, slope))
            factor, slope = (x.reshape(-1, method.rank) for x in (factor, slope))
            bases = explicit(method, side, target, layer or 0, len(factor))
            coefficients = np.asarray(adapter.state.trained[target][side], np.float64)[row]
            expected = np.einsum("k,kur->ur", coefficients, bases)
            if side == "a":
                expected += offset(method, target, layer or 0, len(factor))
            # The vocabulary's padding is left out of a LoRA's file, and of its factors here.
            words = model.config.vocab_size if (target, side) == ("lm_head", "b") else None
            np.testing.assert_allclose(factor[:words], expected[:words], rtol=0, atol=1e-6)
            wanted = np.einsum("ur,kur->k", slope, bases)
            error = np.linalg.norm(found[target][side][row] - wanted) / np.linalg.norm(wanted)
            assert error <= 2e-5, (target, side, layer)


@pytest.mark.parametrize("method", [METHOD, PURE])
def test_the_first_step_starts_at_the_base(method: NOLA) -> None:
    model = base("llama3")
    fresh = method.init(model, jax.random.key(1))
    if method is METHOD:
        np.testing.assert_array_equal(np.asarray(model(tokens(), fresh)), np.asarray(model(tokens())))
    _, gradient = loss_and_gradient(model, fresh)
    for target, pair in gradient.items():
        assert not np.any(pair["a"]), f"B = 0, so a of {target} has no gradient yet"
        assert np.all(np.any(pair["b"], axis=1)), target
        a, b = (np.asarray(fresh.state.trained[target][side]) for side in "ab")
        assert not np.any(b)
        assert np.any(a) == (method is PURE)
    # Elements of the pure variant's A have the variance that LoRA's have.
    a = np.asarray(PURE.init(model, jax.random.key(1)).state.trained["down_proj"]["a"])
    assert np.std(a) == pytest.approx(48**-0.5, rel=0.4)


def test_who_shares_bases() -> None:
    np.testing.assert_array_equal(explicit(METHOD, "a", "q_proj", 0, 32), explicit(METHOD, "a", "up_proj", 2, 32))
    other_seed = dataclasses.replace(METHOD, basis_seed=6)
    first = explicit(METHOD, "a", "q_proj", 0, 32)
    for method, side, target, layer in [
        (METHOD, "b", "q_proj", 0),
        (other_seed, "a", "q_proj", 0),
        (UNIQUE, "a", "q_proj", 0),
    ]:
        assert not np.array_equal(first, explicit(method, side, target, layer, 32))
    unique = explicit(UNIQUE, "a", "q_proj", 0, 32)
    for target, layer in (("q_proj", 1), ("k_proj", 0)):
        assert not np.array_equal(unique, explicit(UNIQUE, "a", target, layer, 32))


def test_one_basis_is_one_direction() -> None:
    """k = 1, pure: dW is a multiple of a fixed matrix."""
    model = base("llama2")
    changes = []
    for seed in (0, 1):
        adapter = random_nola(model, NOLA(rank=2, bases=1, variant="pure", targets="up_proj"), seed)
        pair = adapter.method.to_lora(adapter).state.trained["up_proj"]
        changes.append((np.asarray(pair["a"][0]) @ np.asarray(pair["b"][0])).ravel())
    sizes = np.linalg.svd(np.stack(changes), compute_uv=False)
    assert sizes[1] < 1e-6 * sizes[0]


def test_only_chosen_layers_change() -> None:
    model = base("llama3")
    method = NOLA(rank=2, bases=5, targets=["q_proj"], layers_to_transform=[2, 0])
    adapter = random_nola(model, method)
    assert {leaf.shape for leaf in jax.tree.leaves(adapter.state.trained)} == {(2, 5)}
    bound = jax.jit(lambda state: method.bind(state, Rows()).layers)(adapter.state)["q_proj"]
    assert np.flatnonzero(np.asarray(bound.a).reshape(3, -1).any(1)).tolist() == [0, 2]
    assert np.asarray(bound.scale).tolist() == [2.0, 0.0, 2.0]  # alpha / r
    # The expansion on the host and the one on the devices.
    lora = method.to_lora(adapter).state.trained["q_proj"]
    for ours, theirs in ((bound.a, lora["a"]), (bound.b, lora["b"])):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


def test_generation_and_evaluation_draw_the_bases_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their programs are those of the factors; tokens and loss are those of programs that draw."""
    model = talking("llama3", tmp_path)[1]
    adapter = random_nola(model, METHOD)
    traced: list[Any] = []

    def watch(module: Any, name: str, **options: Any) -> None:
        program = jax.jit(getattr(module, name).__wrapped__, compiler_options=FAST, **options)

        def run(*args: Any, **named: Any) -> Any:
            traced.append(program.trace(*args, **named))
            return program(*args, **named)

        monkeypatch.setattr(module, name, run)

    watch(generation, "prefill", static_argnames=("program", "slots"))
    watch(generation, "decode", static_argnames="program", donate_argnames="stream")
    examples = [parse_example({"prompt": p, "completion": "cd"}, p) for p in ("ab", "abc")]
    found = evaluation.evaluate(model, examples, adapter, max_new_tokens=6)  # it generates too
    assert len(traced) == 2 and not any(drawn(each) for each in traced)
    monkeypatch.setattr(NOLA, "for_inference", lambda self, adapter: adapter)
    expected = evaluation.evaluate(model, examples, adapter, max_new_tokens=6)
    assert len(traced) == 4 and all(drawn(each) for each in traced[2:])
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert [row.prediction for row in found.rows] == [row.prediction for row in expected.rows]


def drawn(traced: Any) -> bool:
    """Whether a program draws bases: it takes the top byte of a word of the hash, as nothing else does."""
    return re.search(r"shift_right_logical \w+ 24:u32", str(traced.jaxpr)) is not None


SHAPES = {
    # model: layers, width, mlp, heads, KV heads; bases; LoRA r1's numbers; NOLA's numbers
    "7B": (32, 4096, 11008, 32, 32, 128, 2_498_560, 57_344),
    "13B": (40, 5120, 13824, 40, 40, 256, 3_911_680, 143_360),
    "70B": (80, 8192, 28672, 64, 8, 512, 12_943_360, 573_440),
}


@pytest.mark.parametrize("size", SHAPES)
def test_trained_parameters_of_llama_2(size: str) -> None:
    """The paper's table 3: 14 L k; LoRA of rank 1 beside it."""
    layers, width, mlp, heads, kv_heads, bases, lora, nola = SHAPES[size]
    config = config_from_hf(
        {
            "model_type": "llama",
            "vocab_size": 32000,
            "hidden_size": width,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
        }
    )
    layout = single_device()
    model = Model(abstract_params(config, layout), config, layout, {}, size, {})
    for method, count in ((LoRA(rank=1), lora), (NOLA(rank=16, bases=bases), nola)):
        shapes = jax.eval_shape(partial(_state, method, model), jax.random.key(0))
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes.trained)) == count


def _state(method: Any, model: Model, key: Any) -> Any:
    return method.init(model, key).state


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rank=33), r"nola: rank 33 is above q_proj, which is 32 x 32"),
        (dict(targets=["q_proj", "embed_tokens"]), "embed_tokens is a table"),
        (dict(basis_version=2), "version 2 of the hash, this Jora makes version 1"),
        (dict(bases=0), "bases must be at least 1, found 0"),
        (dict(basis_seed=2**32), "basis_seed must be at least 0"),
        (dict(bits=2), "bits must be one of 32, 8, 4, found 2"),
        (dict(variant="paper"), "variant must be one of offset, pure"),
        (dict(rank=0), "rank must be at least 1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(jora.InputError, match=message):
        NOLA(**options).init(base("llama3"), jax.random.key(0))


def test_a_mesh_changes_nothing() -> None:
    """Loss and gradients; MLP, heads and vocabulary are cut in two."""
    one, many = base("llama3"), base("llama3", "fsdp=2,tensor=2")
    (expected, there), (value, here) = (loss_and_gradient(m, random_nola(m, METHOD)) for m in (one, many))
    assert value == pytest.approx(expected, rel=1e-5)
    whole = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(there)))
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(here), jax.tree.leaves(there), strict=True):
        error = np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-3 * whole)
        assert error <= 1e-5, f"{jax.tree_util.keystr(path)} differs by {error:.1e} of its norm"
