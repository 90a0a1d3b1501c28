"""What an adapter adds to the devices' exchange: arrays of [tokens, rank], and its own gradients once.

The compiled train step with LoRA on everything is compared, kind by kind and byte by byte, with the same
program without an adapter. Sizes are chosen so that no two dimensions are equal.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from tests.sharding.collectives import Collective, Probe, collectives, in_loops

from jora.data.batches import Shape
from jora.inference.decode import Program, Stream, decode
from jora.inference.sampling import Sampling
from jora.methods.ia3 import IA3
from jora.methods.lora import LoRA, site_shape
from jora.methods.method import State
from jora.methods.vera import VeRA
from jora.models.cache import KV, STACK_AXES, Cache
from jora.models.config import LINEARS, ModelConfig
from jora.models.families import config_from_hf
from jora.sharding import Layout, parse_mesh
from jora.train.estimation import abstract_programs, simulated_layout
from jora.train.options import TrainOptions

RANK = 6
ROWS, LENGTH, ANSWERS, LAYERS = 4, 56, 8, 3
TOKENS = ROWS * LENGTH
CONFIG: ModelConfig = config_from_hf(
    {
        "model_type": "llama",
        "vocab_size": 1021,
        "hidden_size": 160,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 20,
        "num_hidden_layers": LAYERS,
        "intermediate_size": 352,
    }
)
MESHES = ["tensor=4", "tensor=8", "fsdp=4", "data=2,fsdp=2,tensor=2"]
TARGETS = [*LINEARS, "embed_tokens", "lm_head"]
FAST = {"xla_backend_optimization_level": "0"}  # the partitioner ran before; only the machine code is worse


@cache
def exchanged(mesh: str, method: Any) -> Counter[Collective]:
    """The collectives of one train step."""
    programs = abstract_programs(CONFIG, layout_of(mesh), method, TrainOptions(max_grad_norm=0.0), jnp.float32)
    traced = programs.trace_train(Shape(ROWS, LENGTH, ANSWERS), programs.program._replace(remat="full"))
    text = traced.lower().compile(FAST).as_text()
    assert in_loops(text) == 0
    return collectives(text)


def layout_of(mesh: str) -> Layout:
    return simulated_layout(parse_mesh(mesh), CONFIG)


def added(mesh: str, targets: list[str]) -> Counter[Collective]:
    """What LoRA exchanges beyond the base program."""
    adapted = exchanged(mesh, LoRA(rank=RANK, targets=targets, dropout=0.1))
    return adapted - exchanged(mesh, Probe())


def factor_shapes(layout: Layout) -> dict[tuple[int, ...], int]:
    """Sorted shape of each factor of a layer on one device -> how many factors have it."""
    shapes: Counter[tuple[int, ...]] = Counter()
    for target in TARGETS:
        site = site_shape(CONFIG, target)
        for shape, axes in ((site.in_shape, site.in_axes), (site.out_shape, site.out_axes)):
            local = layout.sharding(axes, shape).shard_shape(shape)
            shapes[ranked((*local, RANK))] += 1
    return shapes


def ranked(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes of a shape without those of 1, in order: the compiler may transpose."""
    return tuple(sorted(size for size in shape if size > 1))


def is_tokens_by_rank(item: Collective) -> bool:
    """[tokens, rank] of the whole batch at most."""
    return RANK in item.shape and math.prod(item.shape) <= TOKENS * RANK and LENGTH in _wholes(item.shape)


def _wholes(shape: tuple[int, ...]) -> set[int]:
    # The sequence may be cut in parts between blocks.
    return {size * parts for size in shape for parts in (1, 2, 4, 8)}


def show(items: Counter[Collective]) -> str:
    lines = (f"  {n} x {i.kind} {i.dtype}{list(i.shape)} = {n * i.bytes} bytes" for i, n in sorted(items.items()))
    return "\n" + "\n".join(lines)


@pytest.mark.parametrize("mesh", MESHES)
def test_layers_add_tokens_by_rank_and_one_reduction_of_each_gradient(mesh: str) -> None:
    extra = added(mesh, list(LINEARS))
    layout = layout_of(mesh)
    factors = factor_shapes(layout)
    small = Counter({i: n for i, n in extra.items() if is_tokens_by_rank(i)})
    gradients = Counter({i: n for i, n in extra.items() if ranked(i.shape) in factors and i not in small})
    # The norm of the gradients is a sum over devices of each leaf.
    scalars = Counter({i: n for i, n in extra.items() if i.shape == ()})
    assert not (other := extra - small - gradients - scalars), f"neither [tokens, rank] nor a gradient:{show(other)}"
    assert {i.kind for i in extra} == {"all-reduce"}, show(extra)

    # Row-parallel (o, down): forward and once more where the layer is computed again. Column-parallel: backward.
    stages = sum(layout.mesh.shape[axis] > 1 for axis in ("tensor_kv", "tensor_rep"))
    allowed = LAYERS * stages * (2 * 2 + 5)
    assert small.total() <= allowed, f"{small.total()} of [tokens, rank], {allowed} allowed:{show(small)}"
    assert bool(small) == (stages > 0)
    local_tokens = TOKENS // layout.batch_shards
    assert sum(n * i.bytes for i, n in small.items()) <= allowed * local_tokens * RANK * 4, show(small)

    # A gradient is summed over the rows' devices once, whatever else is cut.
    for item, count in gradients.items():
        assert count <= LAYERS * factors[ranked(item.shape)], f"more than once:{show(Counter({item: count}))}"
    expected = LAYERS * 2 * len(LINEARS) if layout.batch_shards > 1 else 0
    assert gradients.total() == expected, f"{expected} reductions expected:{show(gradients)}"


@pytest.mark.parametrize("mesh", MESHES)
def test_embeddings_and_head_add_nothing_wide(mesh: str) -> None:
    extra = added(mesh, ["embed_tokens", "lm_head"])
    factors = factor_shapes(layout_of(mesh))
    table = CONFIG.padded_vocab * CONFIG.embed
    for item, count in extra.items():
        size = math.prod(item.shape)
        if RANK in item.shape:
            fine = size <= TOKENS * RANK or ranked(item.shape) in factors
        else:
            # Token numbers, scalars, and the answers' hidden states.
            fine = size <= max(TOKENS, ROWS * ANSWERS * CONFIG.embed)
        assert fine, f"too wide:{show(Counter({item: count}))}"
        assert size < table


@pytest.mark.parametrize("mesh", ["tensor=4", "data=2,fsdp=2,tensor=2"])
@pytest.mark.parametrize("method", [VeRA(rank=RANK), IA3(targets=LINEARS, feedforward_modules=["down_proj"])])
def test_vectors_add_no_activations(method: Any, mesh: str) -> None:
    """IA3 reduces its vectors' gradients alone. VeRA adds [tokens, rank] as LoRA does, and lays out its random
    matrices, which all layers share, once a step.
    """
    extra = exchanged(mesh, method) - exchanged(mesh, Probe())
    activations = Counter({i: n for i, n in extra.items() if LENGTH in _wholes(i.shape)})
    assert all(is_tokens_by_rank(i) and i.kind == "all-reduce" for i in activations), show(activations)
    assert bool(activations) == (method.name == "vera")
    widest = max(CONFIG.mlp, CONFIG.heads * CONFIG.head_dim)
    for item, count in (extra - activations).items():
        assert math.prod(item.shape) <= widest * (RANK if RANK in item.shape else 1), show(Counter({item: count}))
        assert item.kind == "all-reduce" or count <= 3, show(Counter({item: count}))  # not once a layer and target


@pytest.mark.parametrize("mesh", MESHES)
def test_nothing_gathers_queries_keys_or_values(mesh: str) -> None:
    """Neither the base nor the adapter collects heads: no array of [.., head_dim] but shards of weights."""
    heads = CONFIG.head_dim
    gathered = Counter(
        {
            item: count
            for item, count in exchanged(mesh, LoRA(rank=RANK, targets=list(LINEARS), dropout=0.1)).items()
            if item.kind != "all-reduce" and heads in item.shape and LENGTH in _wholes(item.shape)
        }
    )
    assert not gathered, show(gathered)


def decode_step(mesh: str, slots: int) -> jax.stages.Compiled:
    layout, method = layout_of(mesh), LoRA(rank=RANK)
    programs = abstract_programs(CONFIG, layout, method, TrainOptions(), jnp.float32)

    def array(shape: tuple[int, ...], dtype: Any, *axes: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(axes, shape))

    leaf = array(stack_shape(slots), jnp.float32, *STACK_AXES)
    numbers, flags, floats, seeds = (
        array((ROWS,), kind, "batch") for kind in (jnp.int32, jnp.bool_, jnp.float32, jnp.uint32)
    )
    stream = Stream(Cache(KV(leaf, leaf), numbers, layout), numbers, flags, numbers)
    sampling = Sampling(floats, numbers, floats, floats, seeds)
    lowered = decode.lower(
        programs.params,
        State(programs.state.trained, programs.constant),
        stream,
        sampling,
        array((2,), jnp.int32, None),
        array((), jnp.int32),
        program=Program(CONFIG, layout, method),
    )
    return lowered.compile(FAST)


def stack_shape(slots: int) -> tuple[int, ...]:
    return CONFIG.layers, ROWS, slots, CONFIG.kv_heads, CONFIG.head_dim


@pytest.mark.parametrize("mesh", ["tensor=4", "tensor=8", "data=2,fsdp=2,tensor=2"])
def test_a_decode_step_leaves_the_cache_where_it_is(mesh: str) -> None:
    slots = 72  # a size that nothing else has
    text = decode_step(mesh, slots).as_text()
    assert f",{slots}," in text  # the cache is in it
    found = collectives(text)
    assert found  # and so are the layers' reductions
    # The cache has the slots as a dimension; the new q, k and v have head_dim, with one token a row.
    wide = {
        i: n for i, n in found.items() if slots in i.shape or (CONFIG.head_dim in i.shape and i.kind != "all-gather")
    }
    heads = {i: n for i, n in found.items() if i.kind != "all-reduce" and is_heads(i)}
    assert not (moved := Counter({**wide, **heads})), show(moved)


@pytest.mark.parametrize("mesh", ["data=1", "tensor=2"])
def test_a_decode_step_copies_no_cache(mesh: str) -> None:
    """One array holds the keys of all layers: a copy of it in every layer once cost ten times the step."""
    slots = 8192
    compiled = decode_step(mesh, slots)
    devices = layout_of(mesh).devices
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * math.prod(stack_shape(slots)) / devices / 2
    assert not re.findall(rf"= f32\[[\d,]*\b{slots}\b[\d,]*\]\S* copy\(", compiled.as_text())


def is_heads(item: Collective) -> bool:
    """q, k or v of one token a row: fewer elements than any weight that fsdp collects."""
    return CONFIG.head_dim in item.shape and math.prod(item.shape) <= ROWS * CONFIG.heads * CONFIG.head_dim
