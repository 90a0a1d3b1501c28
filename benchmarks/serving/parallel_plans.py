"""Plans for low-rank factors under tensor parallelism, in the programs that serve, and what each exchanges.

Shape legend: L layers, b rows, s tokens, R ranks of the active set, N devices; in and out of a linear.

| factor | training layout (what Jora serves with) | S-LoRA (arXiv 2311.03285, section 6) |
|---|---|---|
| A of q, k, v, gate, up | whole | cut along R; all-gather of [b, s, R] |
| B of those | cut along out, as the weight is | the same |
| A of o, down | cut along in; all-reduce of [b, s, R] | the same |
| B of those | whole | cut along out; the parts travel in the base's own all-reduce |

S-LoRA cuts every factor, and for five linears exchanges what the training layout does not. A third plan, "mixed", has
S-LoRA's o and down, which cost no exchange of their own, and the training layout's other five.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int
from tests.sharding.collectives import collectives

from jora.methods.lora import site_shape
from jora.models.adapted import Bound, Dense, Rows, Site
from jora.models.config import LINEARS, ModelConfig
from jora.models.params import Params, abstract_params
from jora.serve.adapters.active import Active, new_active
from jora.serve.adapters.projection import Expanded
from jora.serve.device.programs import Program, decode, prefill
from jora.serve.pages.layout import PoolLayout
from jora.sharding import Layout
from jora.sharding.layout import TENSOR, mesh_axes
from jora.train.memory import ProgramMemory

PLANS = ("training", "mixed", "s-lora")
ROW_PARALLEL = ("o_proj", "down_proj")
RANKS_OF_BATCH = (4, 2, 1, 1)  # adapters of a decode batch, in eighths of R
PAGE_TOKENS = 16
B_SCALE = 0.05  # of its entries: an adapter then adds about as much as the weight itself


# --- S-LoRA's plan ---


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SLoraProjection:
    """One target's factors, both cut over all tensor devices."""

    a: Float[Array, "*in R"]
    b: Float[Array, "R *out"]

    def apply(self, x: Array, dense: Dense, site: Site, rows: Rows) -> Array:
        mask = site.shared.mask[:, :, 0]
        into, out = _input_spec(dense), _output_spec(dense)
        if site.target not in ROW_PARALLEL:
            gather = _on_devices(_column, dense, (P(), P(None, TENSOR), P(None, *out), P(None, None, TENSOR)), out)
            return dense(x) + gather(x, self.a, self.b, mask)
        assert dense.bias is None and {*mesh_axes(into)} == {*TENSOR}
        specs = (P(None, None, *into), P(*into), P(*into), P(None, TENSOR), P())
        return dense.with_weight(_on_devices(_row, dense, specs, P()), x, self.a, self.b, mask)


def _column(x: Array, a: Array, b: Array, mask: Array) -> Array:
    """One device: its ranks' inner products, gathered from all, times its own outputs' part of B."""
    inner = jnp.where(mask, _inner(x, a), 0)
    return jnp.tensordot(jax.lax.all_gather(inner, TENSOR, axis=2, tiled=True), b, 1)


def _row(x: Array, weight: Array, a: Array, b: Array, mask: Array) -> Array:
    """One device: its partial sum of x W, with its outputs' part of the adapters added before devices sum it."""
    inner = jnp.where(mask, jax.lax.psum(_inner(x, a), TENSOR), 0)
    own = jnp.tensordot(inner, b, 1)
    # As in `active._sum`: the CPU compiler of jax 0.10 must not fuse a product with what sums parts of it.
    partial_sum = jax.lax.optimization_barrier(jnp.tensordot(x, weight, x.ndim - 2))
    at = jax.lax.axis_index(TENSOR) * own.shape[2]
    before = jax.lax.dynamic_slice_in_dim(partial_sum, at, own.shape[2], 2)
    return jax.lax.psum(jax.lax.dynamic_update_slice_in_dim(partial_sum, before + own, at, 2), TENSOR)


def _inner(x: Float[Array, "b s *in"], a: Float[Array, "*in R"]) -> Float[Array, "b s R"]:
    return jnp.tensordot(x, a, x.ndim - 2)


def _on_devices(function: Callable[..., Array], dense: Dense, specs: Sequence[P], out: P) -> Callable[..., Array]:
    out_spec = P(None, None, *out)
    return jax.shard_map(function, mesh=dense.layout.mesh, in_specs=tuple(specs), out_specs=out_spec, check_vma=False)


def _input_spec(dense: Dense) -> P:
    return P(*dense.layout.spec(dense.in_axes + dense.out_axes, dense.weight.shape)[: dense.inputs])


def _output_spec(dense: Dense) -> P:
    return P(*dense.layout.spec(dense.in_axes + dense.out_axes, dense.weight.shape)[dense.inputs :])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CutActive(Active):
    """The active set cut further; the programs that serve take it as they take the other.

    targets: whose factors lie as S-LoRA lays them.
    """

    targets: tuple[str, ...] = field(default=LINEARS, metadata={"static": True})

    def bind_decode(self, numbers: Int[Array, " b"], expanded: Expanded | None = None) -> Bound:
        bound = super().bind_decode(numbers, expanded)
        cut = {
            target: SLoraProjection(a[..., group.index(target), :], self.b[target])
            for group, a in self.a.items()
            for target in group
            if target in self.targets
        }
        return replace(bound, layers={**bound.layers, **cut})


def cut_further(active: Active, layout: Layout, targets: tuple[str, ...]) -> CutActive:
    """The same factors: A of column-parallel linears cut along R, B of row-parallel ones along their output."""

    def cut(x: Array, axis: int) -> Array:
        return jax.device_put(x, NamedSharding(layout.mesh, P(*(None,) * axis, TENSOR)))

    columns = {target for target in targets if target not in ROW_PARALLEL}
    a = {group: cut(x, x.ndim - 1) if columns.issuperset(group) else x for group, x in active.a.items()}
    b = {t: cut(x, 2) if t in targets and t in ROW_PARALLEL else x for t, x in active.b.items()}
    others = {each.name: getattr(active, each.name) for each in fields(active)}
    return CutActive(**{**others, "a": a, "b": b}, targets=targets)


# --- the programs, on random numbers ---


class Shape(NamedTuple):
    """What a program computes. context: tokens that a row has in the pool before it."""

    step: str  # "decode" or "prefill"
    rows: int
    tokens: int
    context: int

    @property
    def total(self) -> int:
        return self.rows * self.tokens


class Compiled(NamedTuple):
    """A program of one plan, ready to run: run(pool) -> (pool, logits)."""

    program: Any
    run: Callable[[Array], tuple[Array, Array]]


def draw(shapes: Any, random: np.random.Generator, scale: float, norms: float = 0.0) -> Any:
    """Random numbers for every array of a tree, norms' about `norms`; on the host, where nothing compiles."""

    def one(path: Any, leaf: Any) -> Array:
        numbers = scale * random.standard_normal(leaf.shape, dtype=np.float32)
        centre = norms if "norm" in jax.tree_util.keystr(path) else 0.0
        return jax.device_put(numbers + np.float32(centre), leaf.sharding)

    return jax.tree_util.tree_map_with_path(one, shapes)


def random_active(config: ModelConfig, layout: Layout, ranks: int, shape: Shape, random: np.random.Generator) -> Active:
    """An active set full of factors in the training layout: adapters of differing ranks (prefill: one)."""
    empty = new_active(config, layout, LINEARS, ranks, 0, jnp.float32)
    a = {group: draw(x, random, site_shape(config, group[0]).in_size ** -0.5) for group, x in empty.a.items()}
    eighths = RANKS_OF_BATCH if shape.step == "decode" else (8,)
    owner = np.repeat(np.arange(len(eighths), dtype=np.int32), [part * ranks // 8 for part in eighths])
    b = draw(empty.b, random, B_SCALE)
    return replace(empty, a=a, b=b, owner=jax.device_put(owner, empty.owner.sharding))


def new_pool(program: Program, shape: Shape, random: np.random.Generator) -> tuple[Array, np.ndarray]:
    """A pool of random keys and values, and the rows' page tables [groups, b, blocks]."""
    pages = program.pool_layout
    tables = np.zeros((len(pages.groups), shape.rows, pages.blocks(shape.context + shape.tokens)), np.int32)
    tables[:] = 1 + np.arange(tables.size).reshape(tables.shape)
    empty = pages.new_pool(1 + tables.size, program.layout)
    return draw(empty, random, 1.0), tables


def compiled(
    program: Program,
    params: Params,
    active: Active | None,
    pool: Array,
    tables: np.ndarray,
    shape: Shape,
    **options: Any,
) -> Compiled:
    """The decode step or prefill chunk that serves, over this active set. options: of the compiler."""
    ids = np.random.default_rng(3).integers(0, program.config.vocab_size, shape.total).astype(np.int32)
    if shape.step == "decode":
        numbers = np.arange(shape.rows, dtype=np.int32) % (len(RANKS_OF_BATCH) + 1) - 1  # base rows among them
        rest: tuple[Any, ...] = (ids, np.full(shape.rows, shape.context, np.int32), numbers, tables)
    else:
        rest = (ids, np.int32(shape.context), np.int32(shape.tokens), np.int32(0), tables[:, 0])
    function: Any = decode if shape.step == "decode" else prefill
    made = function.lower(params, active, pool, *rest, program=program).compile(options)

    def run(pool: Array) -> tuple[Array, Array]:
        pool, logits, *_ = made(params, active, pool, *rest)
        return pool, logits

    return Compiled(made, run)


def all_plans(
    config: ModelConfig, layout: Layout, ranks: int, shape: Shape, **options: Any
) -> tuple[dict[str, Compiled], Array]:
    """The base's program and every plan's over the same numbers, and the pool that they pass on to each other."""
    if sum(layout.mesh.shape[axis] > 1 for axis in TENSOR) > 1:
        # A sum over both hidden axes is one exchange or two, as the compiler likes: formulas say neither.
        raise SystemExit("tensor must divide the KV heads or be a multiple of a single one")
    program = Program(config, layout, PoolLayout.of(config, layout, jnp.float32, PAGE_TOKENS))
    random = np.random.default_rng(0)
    # Norms that multiply by almost nothing would silence the layers, and every adapter.
    params = draw(abstract_params(config, layout), random, 0.02, norms=0.0 if config.norm_offset else 1.0)
    active = random_active(config, layout, ranks, shape, random)
    pool, tables = new_pool(program, shape, random)
    mixed, slora = (cut_further(active, layout, targets) for targets in (ROW_PARALLEL, LINEARS))
    sets = {"base": None, **dict(zip(PLANS, (active, mixed, slora), strict=True))}
    make = partial(compiled, program, params, pool=pool, tables=tables, shape=shape, **options)
    return {plan: make(active=own) for plan, own in sets.items()}, pool


# --- what a program exchanges, computes and holds ---


class Cost(NamedTuple):
    """Of one device. exchanged: (kind, bytes of the result) -> times a layer. flops: of a layer, the head and what
    else runs once. resident: bytes of all arguments.
    """

    exchanged: Counter[tuple[str, int]]
    flops: float
    resident: int

    def beyond(self, base: Cost) -> Cost:
        """What an adapter adds."""
        return Cost(self.exchanged - base.exchanged, self.flops - base.flops, self.resident - base.resident)

    def times(self, kind: str) -> int:
        """How often a layer runs such an exchange."""
        return sum(n for (name, _), n in self.exchanged.items() if name == kind)

    def sent(self, devices: int) -> float:
        """Bytes that a device sends a layer, by ring algorithms."""
        parts = {"all-gather": (devices - 1) / devices, "all-reduce": 2 * (devices - 1) / devices}
        return sum(n * parts[kind] * size for (kind, size), n in self.exchanged.items())


def cost(program: Any, layers: int) -> Cost:
    """By the compiler's analysis, which counts the body of the layers' loop once."""
    found: Counter[tuple[str, int]] = Counter()
    for item, times in collectives(program.as_text()).items():
        found[item.kind, item.bytes] += times
    # What runs less than once a layer stands outside the layers' loop.
    a_layer = Counter({item: times // layers for item, times in found.items() if times >= layers})
    return Cost(a_layer, program.cost_analysis()["flops"], ProgramMemory.of(program).arguments)


def expected(plan: str, config: ModelConfig, layout: Layout, ranks: int, shape: Shape, itemsize: int = 4) -> Cost:
    """What the plan adds by its formulas.

    With B tokens a device sends 2 x 2 (N-1) B R / N numbers for the sums and, in S-LoRA's plan, 5 (N-1) B R / N for
    the gathers: in attention 5 of these, as the paper has it, in a gated MLP 4.
    """
    inner, devices = shape.total * ranks * itemsize, layout.tensor_shards
    exchanged = Counter({("all-reduce", inner): len(ROW_PARALLEL)})
    if plan == "s-lora":
        exchanged["all-gather", inner] = len(LINEARS) - len(ROW_PARALLEL)
    held, products = 0, 0
    for target in LINEARS:
        site, row = site_shape(config, target), target in ROW_PARALLEL
        into, out = (
            math.prod(layout.sharding(axes, sizes).shard_shape(sizes))
            for axes, sizes in ((site.in_axes, site.in_shape), (site.out_axes, site.out_shape))
        )
        if plan == "s-lora" and not row:
            into //= devices
        part = out // devices if row else out
        held += into + (out if plan == "training" else part)
        # A prompt's residual is cut along the sequence: a whole B meets a device's own tokens alone.
        whole = plan == "training" and shape.tokens % devices
        products += into + (out if whole else part)
    return Cost(exchanged, 2.0 * shape.total * ranks * products, config.layers * ranks * held * itemsize)


def largest_difference(logits: Mapping[str, Array]) -> float:
    """Of the plans from the training layout, in units of the largest logit."""
    first = np.asarray(logits["training"])
    return max(float(np.abs(np.asarray(logits[plan]) - first).max() / np.abs(first).max()) for plan in PLANS)
