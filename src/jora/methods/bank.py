"""Many adapters as one: each row of a batch meets the adapter of its own job.

Jobs whose arrays have equal shapes are one *kind*: their states are stacked, and what a kind computes is its
method's own `bind` and `apply`, mapped over the jobs (`jax.vmap`). A job owns fixed rows of every batch, so that
all of it is static: a job of rank r costs its own rows x r, whatever the ranks of the others, and the base's
product is one matrix product over the rows of all.

Rows of a batch, outermost first: device of the batch axes, kind, job, row. Each device so has its share of every
job's rows, and taking a kind's rows moves nothing between devices.

Stacked leaves keep their first axis (usually layers, which the decoder scans) and have the jobs after it:
[layers, jobs, ...]; a scalar becomes [jobs].

Shape legend: b rows of the batch, j jobs of a kind, n rows of a job, s tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import compress
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jora.errors import InputError
from jora.methods.method import Adapter, Method, State
from jora.models.adapted import Bound, Dense, Rows, Site
from jora.models.config import ModelConfig


@dataclass(frozen=True)
class Kind:
    """`jobs` jobs of equal shapes, bound by `method`; each owns `rows` rows of a batch on every device of it."""

    method: Method
    jobs: int
    rows: int


@dataclass(frozen=True)
class Spans:
    """Where in a batch the rows of each kind are: `sizes` are (jobs, rows of a job on a device)."""

    shards: int
    sizes: tuple[tuple[int, int], ...]

    @property
    def rows(self) -> int:
        """Rows of the whole batch."""
        return self.shards * sum(jobs * rows for jobs, rows in self.sizes)

    def split(self, x: Array) -> list[Array]:
        """[b, ...] -> for each kind [j, n, ...]."""
        rest = x.shape[1:]
        local = x.reshape(self.shards, -1, *rest)
        parts = jax.lax.split(local, [jobs * rows for jobs, rows in self.sizes], axis=1)
        return [
            jnp.moveaxis(part.reshape(self.shards, jobs, rows, *rest), 1, 0).reshape(jobs, -1, *rest)
            for part, (jobs, rows) in zip(parts, self.sizes, strict=True)
        ]

    def join(self, parts: Sequence[Array]) -> Array:
        """Undo `split`."""
        rest = parts[0].shape[2:]
        local = [
            jnp.moveaxis(part.reshape(jobs, self.shards, rows, *rest), 0, 1).reshape(self.shards, jobs * rows, *rest)
            for part, (jobs, rows) in zip(parts, self.sizes, strict=True)
        ]
        return jnp.concatenate(local, axis=1).reshape(-1, *rest)

    def split_rows(self, rows: Rows) -> list[Rows]:
        """What belongs to each row, for each kind; absent fields stay absent."""
        columns = [None if value is None else self.split(value) for value in rows]
        return [Rows(*(c if c is None else c[i] for c in columns)) for i in range(len(self.sizes))]

    def jobs(self) -> Int[np.ndarray, " b"]:
        """The job of each row, counted through all kinds."""
        local = [number for number, (_, rows) in self._numbered() for _ in range(rows)]
        return np.tile(np.array(local, np.int32), self.shards)

    def _numbered(self) -> Iterator[tuple[int, tuple[int, int]]]:
        each = [size for size in self.sizes for _ in range(size[0])]
        return enumerate(each)


@dataclass(frozen=True)
class Bank(Method):
    """The adapters of all jobs as one method; `shards` devices share the rows of a batch (see the module).

    Its state has a tree for each kind. `init` gives every job its own draw; training puts each job's own first
    state in its place.
    """

    kinds: tuple[Kind, ...]
    shards: int = 1

    name: ClassVar[str] = "bank"

    @property
    def spans(self) -> Spans:
        """The rows of a batch."""
        return Spans(self.shards, tuple((kind.jobs, kind.rows) for kind in self.kinds))

    def init(self, model: Any, key: Array) -> Adapter:
        """A fresh adapter for every job."""
        states = []
        for number, kind in enumerate(self.kinds):
            keys = jax.random.split(jax.random.fold_in(key, number), kind.jobs)
            states.append(stack([kind.method.init(model, k).state for k in keys]))
        return Adapter(self, State(*map(tuple, zip(*states, strict=True))), model.config, dict(model.identity))

    def axes(self, config: ModelConfig) -> State:
        own = [kind.method.axes(config) for kind in self.kinds]
        stacked = jax.tree.map(lambda axes: (*axes[:1], None, *axes[1:]), own, is_leaf=_is_axes)
        return State(*map(tuple, zip(*stacked, strict=True)))

    def bind(self, state: State, rows: Rows) -> Bound:
        split = self.spans.split_rows(rows)
        bounds = [
            _bind(kind, State(trained, constant), own)
            for kind, trained, constant, own in zip(self.kinds, state.trained, state.constant, split, strict=True)
        ]
        targets = dict.fromkeys(target for bound in bounds for target in bound.layers)
        layers = {t: BankProjection(tuple(bound.layers.get(t) for bound in bounds), self.spans) for t in targets}
        embeds, heads = tuple(bound.embed for bound in bounds), tuple(bound.head for bound in bounds)
        return Bound(
            layers,
            BankEmbedding(embeds, self.spans) if any(e is not None for e in embeds) else None,
            BankProjection(heads, self.spans) if any(h is not None for h in heads) else None,
            shared=tuple(bound.shared for bound in bounds),
        )


def _is_axes(value: Any) -> bool:
    return isinstance(value, tuple) and not hasattr(value, "_fields") and all(isinstance(a, str | None) for a in value)


def job_axis(leaf: Any) -> int:
    """The axis of the jobs in a stacked leaf."""
    return min(1, len(leaf.shape) - 1)


def job_axes(stacked: Any) -> Any:
    """`job_axis` leaf for leaf, for `jax.vmap`."""
    return jax.tree.map(job_axis, stacked)


def stack(states: Sequence[Any]) -> Any:
    """States of one kind as one tree."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=min(1, leaves[0].ndim)), *states)


def take(stacked: Any, job: Any) -> Any:
    """The tree of one job; `job` may be traced."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, job, job_axis(x), keepdims=False), stacked)


def put(stacked: Any, job: Any, state: Any) -> Any:
    """`stacked` with the tree of one job replaced."""
    return jax.tree.map(
        lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new.astype(x.dtype), job, job_axis(x)), stacked, state
    )


def check_bankable(method: Method, model: Any, where: str) -> None:
    """Raise InputError for a method that cannot share a base and its rows with others."""
    shapes = model.abstract()  # some methods compute their first values from the weights, which takes a while

    def keeps_base(key: Array) -> Array:
        state = method.init(shapes, key).state
        if method.in_place or method.base(state, model.params) is not model.params:
            raise InputError(f"{where}: {method.name} changes the base's own weights, which all jobs share")
        return key

    if method.prompt_slots or method.instance_width(model.config):
        raise InputError(f"{where}: {method.name} puts a prompt of its own before the tokens: train it alone")
    jax.eval_shape(keeps_base, jax.random.key(0))


def _bind(kind: Kind, state: State, rows: Rows) -> Bound:
    mapped = jax.vmap(
        kind.method.bind,
        in_axes=(job_axes(state), 0),
        out_axes=Bound(layers=1, embed=0, head=0, shared=0),  # type: ignore[arg-type]
        axis_size=kind.jobs,
    )
    bound: Bound = mapped(state, rows)
    return bound


@dataclass(frozen=True)
class _Known(Dense):
    """A `Dense` whose product with one array is there already: `dense(x)` of that very array only adds the bias."""

    inner: Dense = field(kw_only=True)
    known: tuple[Array, Array] = field(kw_only=True)  # x, x W
    uses: list[bool] = field(kw_only=True, default_factory=list)  # gets an entry whenever it is asked for

    @classmethod
    def of(cls, dense: Dense, x: Array, product: Array) -> _Known:
        """`dense`, knowing x W."""
        own = {name: getattr(dense, name) for name in ("weight", "bias", "in_axes", "out_axes", "layout")}
        return cls(**own, inner=dense, known=(x, product))

    def _product(self, x: Array) -> Array:
        given, product = self.known
        if x is not given:
            return self.inner._product(x)
        self.uses.append(True)
        return product

    def column_norm(self, a: Array, b: Array) -> Array:
        return self.inner.column_norm(a, b)

    def weight_of(self, dtype: Any = None) -> Array:
        return self.inner.weight_of(dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BankProjection:
    """The projections of all kinds for one target; None where a kind leaves it alone. Leaves gain a job axis."""

    parts: tuple[Any, ...]
    spans: Spans = field(metadata={"static": True})

    def apply(self, x: Array, dense: Dense, site: Site, rows: Rows) -> Array:
        """Each row through its own job's projection."""
        inputs, split = self.spans.split(x), self.spans.split_rows(rows)
        shared = site.shared or (None,) * len(self.parts)
        given = [(part, *each) for part, *each in zip(self.parts, shared, inputs, split, strict=True)]
        results = self._base(x, inputs, dense, [_uses_base(dense, site, *each) for each in given])
        for i, (part, own, rest, of_rows) in enumerate(given):
            apply = partial(_apply, dense, site) if part is not None else partial(_base_alone, dense)
            results[i] = jax.vmap(apply)(part, own, rest, of_rows, results[i])
        return self.spans.join(results)

    def _base(self, x: Array, inputs: list[Array], dense: Dense, uses: list[bool]) -> list[Any]:
        """The base's product for each kind that uses it as it is: one product for all of them."""
        if all(uses):
            return self.spans.split(dense._product(x))
        if not any(uses):
            return [None] * len(uses)
        chosen = Spans(self.spans.shards, tuple(compress(self.spans.sizes, uses)))
        made = iter(chosen.split(dense._product(chosen.join(list(compress(inputs, uses))))))
        return [next(made) if use else None for use in uses]


def _apply(dense: Dense, site: Site, part: Any, shared: Any, x: Array, rows: Rows, product: Array | None) -> Array:
    """One job's rows through its projection."""
    known = dense if product is None else _Known.of(dense, x, product)
    result: Array = part.apply(x, known, site._replace(shared=shared), rows)
    return result


def _base_alone(dense: Dense, part: None, shared: Any, x: Array, rows: Rows, product: Array) -> Array:
    """One job's rows where it adapts nothing."""
    return _Known.of(dense, x, product)(x)


def _uses_base(dense: Dense, site: Site, part: Any, shared: Any, x: Array, rows: Rows) -> bool:
    """Whether a projection asks for the base's product of its input as it is; found by tracing it."""
    if part is None:
        return True
    found = []

    def probe(part: Any, shared: Any, x: Array, rows: Rows) -> Array:
        known = _Known.of(dense, x, dense._product(x))
        part.apply(x, known, site._replace(shared=shared), rows)
        found.append(bool(known.uses))
        return x

    jax.eval_shape(jax.vmap(probe), part, shared, x, rows)
    return found[0]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BankEmbedding:
    """The embedding adapters of all kinds; None where a kind has none."""

    parts: tuple[Any, ...]
    spans: Spans = field(metadata={"static": True})

    def embed(self, tokens: Int[Array, "b s"], vectors: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        """Each row through its own job's embedding."""
        results = self.spans.split(vectors)
        for i, (part, own) in enumerate(zip(self.parts, self.spans.split(tokens), strict=True)):
            if part is not None:
                results[i] = jax.vmap(_embed)(part, own, results[i])
        return self.spans.join(results)


def _embed(part: Any, tokens: Array, vectors: Array) -> Array:
    result: Array = part.embed(tokens, vectors)
    return result
