"""Streaming weights from a source into sharded device stacks, a layer at a time.

Each process reads only the byte ranges that its devices hold; host memory stays near the largest tensor.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array

from jora.errors import InputError
from jora.models.bitsandbytes import QuantisedSource
from jora.models.config import ModelConfig
from jora.models.params import Params, abstract_stack, map_params, pieces_of
from jora.models.source import TensorSource
from jora.models.tensors import TensorSpec, all_specs, norm_specs, weight_specs
from jora.quant import HostTensor, Kind, QuantisedWeight, host_type
from jora.sharding import Layout

PIECE = 8 << 20  # bytes converted at a time: what a tensor costs beyond its own copy

Bounds = list[tuple[int, int]]  # [start, stop) along each dimension

# Tensors that old checkpoints carry although they are computed, never learned.
_COMPUTED = ("rotary_emb.inv_freq",)


def check_tensors(source: TensorSource, config: ModelConfig) -> None:
    """Raise InputError, by name, for a missing, extra or misshapen tensor."""
    expected = {spec.name: spec.hf_shape for spec in all_specs(config)}
    found = {n for n in source.names() if not n.endswith(_COMPUTED)}
    if config.tied_embeddings:
        found.discard("lm_head.weight")  # some tied checkpoints store the table twice
    if missing := sorted(expected.keys() - found):
        raise InputError(f"the model lacks tensor {missing[0]}{_more(missing)} that its config.json asks for")
    if extra := sorted(found - expected.keys()):
        raise InputError(f"the model has tensor {extra[0]}{_more(extra)} that a {config.family} does not have")
    for name, shape in expected.items():
        if source.shape(name) != shape:
            raise InputError(f"tensor {name} has shape {source.shape(name)}; config.json asks for {shape}")


def has_own_head(source: TensorSource) -> bool:
    """Whether a head is stored beside the embeddings and differs from them.

    transformers then uses it, although config.json ties the two. Compared in pieces of a few MiB.
    """
    head, table = "lm_head.weight", "model.embed_tokens.weight"
    if not {head, table} <= source.names() or source.shape(head) != source.shape(table):
        return False
    rows, width = source.shape(table)
    step = max(1, PIECE // (4 * width))
    pieces = ((slice(start, min(start + step, rows)), slice(None)) for start in range(0, rows, step))
    return any(not np.array_equal(source.read(head, piece), source.read(table, piece)) for piece in pieces)


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def load_params(
    source: TensorSource,
    config: ModelConfig,
    layout: Layout,
    dtype: Any,
    on_tensor: Any = None,
    quant: Kind | None = None,
) -> Params:
    """All weights on their devices in `dtype`. `on_tensor(count)` is told of every tensor read.

    quant: the linear layers' weights are quantised as they are read, or taken as the source stores them.
    """
    check_tensors(source, config)
    numpy_dtype = np.dtype(dtype)
    count = itertools.count(1)

    def tensor(spec: TensorSpec, shape: tuple[int, ...]) -> Array:
        """One tensor on its devices; `shape` may have more rows than the file (padded vocabulary)."""
        shards: dict[Any, np.ndarray] = {}

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            key = tuple((s.start, s.stop) for s in index)
            if key not in shards:  # replicas ask for the same bytes
                shards[key] = read_shard(source, spec, index, shape, numpy_dtype)
            return shards[key]

        array = jax.make_array_from_callback(shape, layout.sharding(spec.axes, shape), shard)
        array.block_until_ready()  # the copy is asynchronous: host copies of several tensors would pile up
        if on_tensor is not None:
            on_tensor(next(count))
        return array

    def stack(specs: list[TensorSpec], shape: tuple[int, ...]) -> Any:
        if quant is not None and specs[0].outputs:
            return _load_quantised(source, specs, layout, quant, lambda: on_tensor and on_tensor(next(count)))
        sharding = layout.sharding((None, *specs[0].axes), shape)
        whole = _zeros(jax.ShapeDtypeStruct(shape, dtype, sharding=sharding))
        for number, spec in enumerate(specs):
            whole = _put(whole, tensor(spec, shape[1:]), number)
            whole.block_until_ready()
        return whole

    def top(spec: TensorSpec, shape: tuple[int, ...]) -> Array:
        if len(shape) == 1:
            return tensor(spec, shape)
        array = _load_table(source, spec, shape, layout.sharding(spec.axes, shape), numpy_dtype)
        if on_tensor is not None:
            on_tensor(next(count))
        return array

    return map_params(config, top, stack)


def _load_quantised(
    source: TensorSource, specs: list[TensorSpec], layout: Layout, quant: Kind, on_tensor: Callable[[], Any]
) -> QuantisedWeight:
    """A stack of quantised weights, one at a time: the host holds one in few bits, and some MiB of it dense."""
    abstract = abstract_stack(specs, layout, quant)
    pieces = pieces_of(specs[0], layout)
    fields = abstract.fields(pieces)
    stacks = {name: _zeros(getattr(abstract, name)) for name in fields}
    shardings = {name: NamedSharding(layout.mesh, field.spec) for name, field in fields.items()}
    for number, spec in enumerate(specs):
        for name, array in _quantised(source, spec, quant).arrays(pieces).items():
            placed = jax.make_array_from_callback(array.shape, shardings[name], array.__getitem__)
            stacks[name] = _put(stacks[name], placed, number).block_until_ready()
        on_tensor()
    return type(abstract)(shape=abstract.shape, **stacks)


def _quantised(source: TensorSource, spec: TensorSpec, quant: Kind) -> HostTensor:
    if isinstance(source, QuantisedSource):
        return source.stored(spec.name)

    def rows(start: int, stop: int) -> np.ndarray:
        return source.read(spec.name, (slice(start, stop), slice(None)))

    return host_type(quant).quantise(spec.hf_shape, rows, PIECE // 4)  # type: ignore[arg-type]


def _zeros(abstract: jax.ShapeDtypeStruct) -> Array:
    return _zeros_of(abstract.shape, abstract.dtype, abstract.sharding)


@partial(jax.jit, static_argnums=(0, 1, 2))  # compiled once a shape, not once a stack
def _zeros_of(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Array:
    return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), sharding)


def _load_table(
    source: TensorSource, spec: TensorSpec, shape: tuple[int, ...], sharding: jax.sharding.Sharding, dtype: np.dtype
) -> Array:
    """A vocabulary's table on its devices, some rows at a time: it may be far larger than a layer."""
    holders: dict[tuple[tuple[int, int], ...], list[Any]] = {}  # replicas hold the same box
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None  # only where jax does not know the shape
        box = tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))
        holders.setdefault(box, []).append(device)
    parts = {}
    for box, devices in holders.items():
        (first, last), columns = box
        local = (last - first, columns[1] - columns[0])
        parts.update({device: jnp.zeros(local, dtype, device=device) for device in devices})
        step = max(1, PIECE // (local[1] * dtype.itemsize))
        for start in range(first, last, step):
            rows = read_shard(source, spec, (slice(start, min(start + step, last)), slice(*columns)), shape, dtype)
            for device in devices:
                parts[device] = _put_rows(parts[device], jax.device_put(rows, device), start - first)
            jax.block_until_ready([parts[device] for device in devices])
    return jax.make_array_from_single_device_arrays(shape, sharding, list(parts.values()))


@partial(jax.jit, donate_argnums=0)
def _put_rows(table: Array, rows: Array, start: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(table, rows, start, 0)


@partial(jax.jit, donate_argnums=0)
def _put(stack: Array, layer: Array, number: int) -> Array:
    return jax.lax.dynamic_update_index_in_dim(stack, layer, number, 0)


def read_shard(
    source: TensorSource, spec: TensorSpec, index: tuple[slice, ...], shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    """The slice `index` of a tensor in Jora's layout, converted to `dtype` in pieces of a few MiB."""
    bounds = [s.indices(size)[:2] for s, size in zip(index, shape, strict=True)]
    out = np.zeros([stop - start for start, stop in bounds], dtype)
    if spec.outputs:
        cut = len(shape) - spec.outputs
        _read_linear(source, spec, bounds[cut:], bounds[:cut], out.reshape(_flat(bounds[:cut]), -1))
    else:
        rows = min(bounds[0][1], spec.shape[0])  # the padding rows of a vocabulary stay zero
        flat = out.reshape(-1) if spec.name.endswith(".bias") else out
        if spec.name.endswith(".bias"):
            _fill(source, spec.name, list(_ranges(spec.shape, bounds)), None, flat)
        else:
            columns = None if len(bounds) == 1 else bounds[1]
            _fill(source, spec.name, [(bounds[0][0], rows)], columns, flat)
    return out


def _flat(bounds: Bounds) -> int:
    return math.prod(stop - start for start, stop in bounds)


def _read_linear(source: TensorSource, spec: TensorSpec, outs: Bounds, ins: Bounds, out: np.ndarray) -> None:
    """Fill `out` [in, out] from Hugging Face's [out, in]."""
    cut = len(spec.shape) - spec.outputs
    at = 0
    for first, last in _ranges(spec.shape[:cut], ins):
        width = last - first
        block = out[at : at + width]
        _fill(source, spec.name, list(_ranges(spec.shape[cut:], outs)), (first, last), block.T)
        at += width


def _ranges(shape: tuple[int, ...], bounds: Bounds) -> Iterator[tuple[int, int]]:
    """The contiguous runs of flat indices that a box of an array covers, in order."""
    # Trailing dimensions that are taken whole belong to one run.
    whole = len(shape)
    while whole > 0 and bounds[whole - 1] == (0, shape[whole - 1]):
        whole -= 1
    if whole == 0:
        yield 0, math.prod(shape)
        return
    stride = math.prod(shape[whole:])
    start, stop = bounds[whole - 1]
    for outer in itertools.product(*(range(a, b) for a, b in bounds[: whole - 1])):
        base = 0
        for position, size in zip(outer, shape[: whole - 1], strict=True):
            base = base * size + position
        base *= shape[whole - 1]
        yield (base + start) * stride, (base + stop) * stride


def _fill(
    source: TensorSource,
    name: str,
    rows: list[tuple[int, int]],
    columns: tuple[int, int] | None,
    out: np.ndarray,
) -> None:
    """Copy row ranges (and a column range) of a tensor into consecutive rows of `out`, in pieces."""
    at = 0
    for first, last in rows:
        width = 1 if columns is None else columns[1] - columns[0]
        step = max(1, PIECE // (4 * width))
        for start in range(first, last, step):
            stop = min(start + step, last)
            index = (slice(start, stop),) if columns is None else (slice(start, stop), slice(*columns))
            out[at : at + stop - start] = source.read(name, index)
            at += stop - start


def fingerprint(source: TensorSource, config: ModelConfig) -> str:
    """A short identity of the base: every norm, and the first row of every layer's matrices (sha256).

    Reading all of a 70B model for a hash would cost minutes; any training of the base moves these. A model
    that was quantised here keeps the identity of the one that it was made from.
    """
    if isinstance(source, QuantisedSource) and source.fingerprint is not None:
        return source.fingerprint
    digest = hashlib.sha256()
    for layer in range(config.layers):
        for spec in (*norm_specs(config, layer).values(), *weight_specs(config, layer).values()):
            index = (slice(0, 1), slice(None)) if spec.outputs else (slice(None),)
            digest.update(spec.name.encode())
            digest.update(np.ascontiguousarray(source.read(spec.name, index), np.float32).tobytes())
    return digest.hexdigest()[:32]
