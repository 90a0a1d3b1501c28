"""The mesh changes where numbers are computed, never which: loss, gradients and adapter equal one device's.

Weights are those of `tests.tiny`, of a scale at which fp32 is enough: with 0.02-sized random weights a Gemma's
norms divide by almost nothing, and the rounding of *one* device is then 1e-3 away from float64.
"""

from __future__ import annotations

import zlib
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tests.tiny import VOCAB, tiny

import jora
from jora.data.batches import Batch
from jora.methods.factors import Factors, FactorSite, device_state
from jora.methods.lora import LoRA
from jora.methods.method import Adapter, State
from jora.models.config import LINEARS
from jora.sharding import MeshSpec
from jora.train.feed import to_devices
from jora.train.optimizer import make_optimizer
from jora.train.options import TrainOptions
from jora.train.state import abstract_adapter, abstract_train_state, first_train_state
from jora.train.step import Program, train_step

TOLERANCE = 1e-5  # of an array's norm
# A gradient this much smaller than the whole is what is left after larger numbers cancelled.
TINY = 1e-3
ROWS = 6  # fsdp=4 and data=8 do not divide it: the batch is padded there

# Compiling is what takes time here; the partitioning among devices stays the same.
FAST = {"xla_backend_optimization_level": "0"}

METHOD = LoRA(rank=3, alpha=6, targets=[*LINEARS, "embed_tokens", "lm_head"], dropout=0.1)
OPTIONS = TrainOptions(learning_rate=1e-3, max_grad_norm=0.0, weight_decay=0.01, schedule="constant", warmup=0.0)

# Eight query heads on two KV heads: on tensor=4 and tensor=8 each KV head serves several devices.
HEADS = dict(num_attention_heads=8, num_key_value_heads=2)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama3", dict(**HEADS, num_hidden_layers=2)),
    "gemma3": (
        "gemma3",
        dict(
            **HEADS,
            num_hidden_layers=2,
            layer_types=["sliding_attention", "full_attention"],
        ),
    ),
    # Nothing but the vocabulary's padded table is divided by 8, and little by 4.
    "indivisible": (
        "llama3",
        dict(
            hidden_size=30,
            intermediate_size=44,
            num_attention_heads=6,
            num_key_value_heads=3,
            head_dim=10,
            num_hidden_layers=2,
        ),
    ),
}


class Result(NamedTuple):
    """What one optimiser step gave, on the host: true values, padding cut off."""

    loss: float
    norm: float
    gradients: dict[str, np.ndarray]
    adapter: dict[str, np.ndarray]
    files: dict[str, np.ndarray]  # of the saved adapter, by tensor name


def first_factors(site: FactorSite) -> Factors:
    """Random A and B: with the zeros of a fresh adapter half of the gradients would be zero."""
    draw = np.random.default_rng(zlib.crc32(site.names[0].encode()))
    a, b = (0.1 * draw.standard_normal(shape).astype(np.float32) for shape in site.shapes)
    return Factors(a, b)


def batch(length: int, rows: int) -> Batch:
    """The same ROWS random rows, and padding rows up to `rows`."""
    draw = np.random.default_rng(length)
    answers = max(1, length // 3)
    true = Batch(
        tokens=draw.integers(0, VOCAB, (ROWS, length)),
        positions=np.broadcast_to(np.arange(length), (ROWS, length)),
        segments=np.ones((ROWS, length)),
        answer_positions=draw.integers(0, length, (ROWS, answers)),
        answer_targets=draw.integers(0, VOCAB, (ROWS, answers)),
        # Unequal numbers of answer tokens a row.
        answer_weights=np.where(draw.random((ROWS, answers)) < 0.7, draw.random((ROWS, answers)), 0.0),
        row_ids=np.arange(ROWS),
    )
    more = rows - ROWS
    padded = (np.pad(leaf, ((0, more), *((0, 0),) * (leaf.ndim - 1))) for leaf in true)
    return Batch(*(x.astype(np.float32 if x.dtype.kind == "f" else np.int32) for x in padded))


def one_step(name: str, length: int, mesh: str | None, folder: Path) -> Result:
    family, overrides = MODELS[name]
    model = jora.load_model(tiny(family, **overrides)[1], dtype="float32", mesh=mesh)
    layout, config = model.layout, model.config
    adapter = Adapter(METHOD, device_state(METHOD, config, layout, first_factors), config, model.identity)
    optimizer = make_optimizer(OPTIONS, total_steps=10)
    abstract = abstract_adapter(METHOD, adapter.state, config, layout)
    state = first_train_state(adapter, abstract_train_state(abstract.trained, optimizer, layout), optimizer)
    batches = to_devices([batch(length, -(-ROWS // layout.batch_shards) * layout.batch_shards)], layout, packed=False)
    program = Program(config, layout, METHOD, optimizer, "selective")
    inputs = (state, adapter.state.constant, model.params, batches, np.uint32(7))
    state, metrics = train_step.lower(*inputs, program=program).compile(FAST)(*inputs)
    trained = Adapter(METHOD, State(state.trained, adapter.state.constant), config, model.identity)
    jora.save_adapter(trained, folder / "adapter")
    # AdamW's first mean of gradients is (1 - beta1) times the gradient.
    means = next(s.mu for s in jax.tree.leaves(state.optimizer, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu"))
    return Result(
        float(metrics["loss"]),
        float(metrics["grad_norm"]),
        {k: v / (1 - OPTIONS.beta1) for k, v in named(means).items()},
        named(state.trained),
        load_file(folder / "adapter" / "adapter_model.safetensors"),
    )


def named(tree: Any) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(model, length) -> the step on one device, computed once."""
    return cache(lambda name, length: one_step(name, length, None, tmp_path_factory.mktemp("one")))


def assert_equal(found: Result, expected: Result) -> None:
    assert found.loss == pytest.approx(expected.loss, rel=TOLERANCE)
    assert found.norm == pytest.approx(expected.norm, rel=TOLERANCE)
    floors = {"gradients": TINY * expected.norm, "adapter": 0.0, "files": 0.0}
    wrong = []
    for part, floor in floors.items():
        ours, theirs = getattr(found, part), getattr(expected, part)
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            error = np.linalg.norm(ours[name] - value) / max(np.linalg.norm(value), floor)
            if not error <= TOLERANCE:
                wrong.append(f"{part} {name}: {error:.1e}")
    assert not wrong, f"beyond {TOLERANCE:.0e} of the norm: {wrong}"


SPLITS = [MeshSpec(d, f, 8 // d // f) for d in (1, 2, 4, 8) for f in (1, 2, 4, 8) if d * f <= 8]
# Every split once, few lengths a model: each (model, length) compiles once more, on one device.
CASES = [
    ("llama", 1, MeshSpec(1, 1, 8)),
    ("llama", 129, MeshSpec(1, 1, 8)),
    ("llama", 129, MeshSpec(1, 2, 4)),
    ("llama", 129, MeshSpec(8, 1, 1)),
    ("llama", 129, MeshSpec(2, 2, 2)),
    ("gemma3", 129, MeshSpec(1, 1, 8)),
    ("gemma3", 129, MeshSpec(1, 8, 1)),
    ("gemma3", 129, MeshSpec(2, 1, 4)),
    ("gemma3", 129, MeshSpec(1, 4, 2)),
    ("gemma3", 129, MeshSpec(2, 4, 1)),
    # Odd lengths stay whole; here the residual stream is cut over the sequence, as in a real run.
    ("llama", 16, MeshSpec(1, 1, 8)),
    ("llama", 16, MeshSpec(1, 2, 4)),
    ("gemma3", 16, MeshSpec(1, 1, 8)),
    ("gemma3", 16, MeshSpec(2, 2, 2)),
    ("indivisible", 7, MeshSpec(4, 1, 2)),
    ("indivisible", 7, MeshSpec(4, 2, 1)),
    ("indivisible", 7, MeshSpec(1, 1, 8)),
]


def test_the_cases_cover_every_split() -> None:
    assert len(SPLITS) == 10
    assert {mesh for _, _, mesh in CASES} == set(SPLITS)
    cut = [mesh for _, length, mesh in CASES if mesh.tensor > 1 and length % mesh.tensor == 0]
    assert {mesh.tensor for mesh in cut} == {2, 4, 8}


@pytest.mark.parametrize(("name", "length", "mesh"), CASES, ids=[f"{n}-{s}-{m}" for n, s, m in CASES])
def test_a_step_equals_one_device(name: str, length: int, mesh: MeshSpec, on_one_device: Any, tmp_path: Path) -> None:
    expected = on_one_device(name, length)
    found = one_step(name, length, str(mesh), tmp_path)
    assert_equal(found, expected)
    for target, gradient in expected.gradients.items():
        # There was something to agree on; the one token of length 1 attends to itself, whatever q and k are.
        assert np.any(gradient) or (length == 1 and target[2] in "qk")
