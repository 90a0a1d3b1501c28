"""PiSSA (arXiv 2404.02948): a LoRA that starts as the principal part of the weight, as PEFT initialises it.

W = U S V^T; A0 = U_r (S_r / s)^(1/2), B0 = (S_r / s)^(1/2) V_r^T, and y = x (W - s A0 B0) + s (x A) B.

PEFT edits the base: W - s A0 B0 takes W's place. Here the base stays as it is and the constant product is taken off:
y = x W - s (x A0) B0 + s (x A) B. That costs r more columns in a product that is narrow anyway. In return one base
serves every adapter, evaluation, merging and checkpoints see the base that the user named, and what is saved is
exact: the change of W is s (A B - A0 B0), a LoRA of rank 2 r. PEFT writes the same with
`path_initial_model_for_weight_conversion`. `save_residual` writes what PEFT trains on instead.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jora.errors import InputError
from jora.kernels.low_rank import low_rank
from jora.methods.extras.both import without_extras
from jora.methods.lora import LoRA, LoRAProjection, check_rank, site_shape
from jora.methods.method import Adapter, State
from jora.methods.targets import EMBED, HEAD
from jora.models.adapted import Dense, Rows, Site
from jora.models.config import ModelConfig
from jora.models.model import Model
from jora.models.tensors import LinearShape
from jora.sharding import Layout

_INIT = re.compile(r"pissa(?:_niter_(\d+))?")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PiSSAProjection:
    """A trained pair and its first values, whose product is taken off. No dropout there: it stands for the base."""

    pair: LoRAProjection
    first: dict[str, Array] = field(default_factory=dict)

    def apply(self, x: Array, dense: Dense, site: Site, rows: Rows) -> Array:
        scaled = self.first["b"] * self.pair.scale
        return self.pair.apply(x, dense, site, rows) - low_rank(x, self.first["a"], scaled, dense.layout)


@dataclass(frozen=True)
class PiSSA(LoRA):
    """LoRA's options. init_lora_weights: "pissa" (a full singular value decomposition of every adapted weight) or
    "pissa_niter_n", a randomised one with n subspace iterations (arXiv 0909.4061): 16 is accurate and far faster.

    Needs the weights as they are: not a quantised base. embed_tokens cannot be adapted.
    """

    init_lora_weights: bool | str = "pissa"

    name: ClassVar[str] = "pissa"
    needs: ClassVar[frozenset[str]] = frozenset({"dense_weight"})

    def _check_init(self, ranks: Sequence[int]) -> None:
        if not isinstance(self.init_lora_weights, str) or not _INIT.fullmatch(self.init_lora_weights):
            raise InputError(f"pissa: init_lora_weights {self.init_lora_weights!r}: use pissa, or pissa_niter_16")

    def sites(self, config: ModelConfig) -> dict[str, dict[int | None, tuple[int, float]]]:
        sites = super().sites(config)
        if EMBED in sites:
            raise InputError(f"pissa: {EMBED} cannot be adapted; name the other targets, or use lora")
        for target, by_layer in sites.items():
            check_rank("pissa", config, target, max(rank for rank, _ in by_layer.values()))
        if any(scale <= 0 for by_layer in sites.values() for _, scale in by_layer.values()):
            raise InputError("pissa: alpha must be above 0: the principal part is divided by the scale")
        return sites

    def init(self, model: Any, key: Array) -> Adapter:
        """The principal part of every adapted weight; the key matters to "pissa_niter_n" only."""
        model.check_method(self)
        plain = super().init(model, key)  # its scales, and its shapes where a model has shapes in place of weights
        trained, constant = plain.state
        pairs = without_extras(trained)
        if not isinstance(model.params.embed, jax.ShapeDtypeStruct):
            pairs = {t: self._principal(model, t, key) for t in pairs}
        first = {t: {"scale": constant[t], **pair} for t, pair in pairs.items()}
        return dataclasses.replace(plain, state=State({**trained, **pairs}, {**constant, **first}))

    def _principal(self, model: Model, target: str, key: Array) -> dict[str, Array]:
        config, params = model.config, model.params
        by_layer = self.sites(config)[target]
        if target == HEAD:
            weight = (params.embed if params.head is None else params.head).T[None]
            chosen: tuple[tuple[int, int, float], ...] = ((0, *by_layer[None]),)
            count = 1
        else:
            weight = params.layers.weights[target]
            chosen, count = tuple((layer or 0, *found) for layer, found in by_layer.items()), config.layers
        niter = _INIT.fullmatch(str(self.init_lora_weights))
        steps = int(niter[1]) if niter and niter[1] else None
        pair = _principal_stack(weight, key, chosen, count, steps, site_shape(config, target), model.layout)
        axes = self.factor_axes(config, target)
        stacked = {name: factor[0] if target == HEAD else factor for name, factor in pair.items()}
        return {n: jax.device_put(f, model.layout.sharding(axes[n], f.shape)) for n, f in stacked.items()}

    def axes(self, config: ModelConfig) -> State:
        trained, constant = super().axes(config)
        first = {t: {"scale": constant[t], **axes} for t, axes in without_extras(trained).items()}
        return State(trained, {**constant, **first})

    def projection(self, target: str, factors: Mapping[str, Array], constant: Any) -> PiSSAProjection:
        pair = LoRAProjection(**factors, scale=constant["scale"], dropout=self.dropout)
        return PiSSAProjection(pair, {name: constant[name] for name in factors})

    def to_lora(self, adapter: Adapter) -> Adapter:
        """The change of the base, s (A B - A0 B0), as a LoRA of twice the rank; what PEFT's conversion writes."""
        pairs = {}
        for target, pair in without_extras(adapter.state.trained).items():
            first, outputs = adapter.state.constant[target], len(site_shape(adapter.config, target).out_shape)
            # The pairs' components by turns: true ranks then stay in front of what pads them.
            a = _by_turns(pair["a"], first["a"], axis=-1)
            pairs[target] = {"a": a, "b": _by_turns(pair["b"], -first["b"], axis=-1 - outputs)}
        more = math.sqrt(2) if self.use_rslora else 2
        ranks = {pattern: 2 * rank for pattern, rank in self.rank_pattern.items()}
        alphas = {pattern: more * alpha for pattern, alpha in self.alpha_pattern.items()}
        return self._plain(adapter, pairs, 2 * self.rank, more * self.alpha, ranks, alphas)

    def _plain(self, adapter: Adapter, pairs: Any, *options: Any) -> Adapter:
        """`pairs` as a LoRA; options: rank, alpha and their patterns, this method's where none are given."""
        names = ("rank", "alpha", "rank_pattern", "alpha_pattern")
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | {"init_lora_weights": True}
        trained, constant = adapter.state
        scales = {target: constant[target]["scale"] for target in pairs}
        method = LoRA(**values | dict(zip(names, options, strict=False)))
        return dataclasses.replace(adapter, method=method, state=State({**trained, **pairs}, {**constant, **scales}))


def save_residual(
    model: Model, adapter: Adapter, base: str | os.PathLike[str], directory: str | os.PathLike[str]
) -> None:
    """Write a PiSSA adapter as PEFT trains it: the residual W - s A0 B0 as a model, and A, B as a LoRA of rank r on it.

    base: the Hugging Face directory of the residual, in the model's dtype (so it is rounded: the default, a LoRA of
    rank 2 r on the model itself, is not). directory: the adapter's. Raises InputError where `adapter` is not PiSSA's.
    """
    from jora.methods.merging import merge
    from jora.methods.storage import save_adapter
    from jora.models.loading import fingerprint
    from jora.models.source import SafetensorsSource

    method = adapter.method
    if not isinstance(method, PiSSA):
        raise InputError(f"an adapter of method {method.name} has no residual; save it with jora.save_adapter")
    taken = {t: {"a": c["a"], "b": -c["b"]} for t, c in adapter.state.constant.items()}
    merge(model, method._plain(adapter, taken)).save(base)
    plain = method._plain(adapter, without_extras(adapter.state.trained))
    identity = {"name": str(base), "fingerprint": fingerprint(SafetensorsSource(Path(base)), model.config)}
    save_adapter(dataclasses.replace(plain, base=identity), directory)


def _by_turns(x: Array, y: Array, axis: int) -> Array:
    """x0, y0, x1, y1, ... along an axis (counted from the end)."""
    both = jnp.stack([x, y], axis=x.ndim + axis + 1)
    return both.reshape(*x.shape[:axis], 2 * x.shape[axis], *x.shape[axis:][1:])


@partial(jax.jit, static_argnums=(2, 3, 4, 5, 6))
def _principal_stack(
    weights: Float[Array, "L ..."],
    key: Array,
    chosen: tuple[tuple[int, int, float], ...],
    count: int,
    steps: int | None,
    shape: LinearShape,
    layout: Layout,
) -> dict[str, Array]:
    """A0 [count, *in, r] and B0 [count, r, *out]; chosen: (layer, true rank, scale). One layer at a time."""
    largest = max(rank for _, rank, _ in chosen)
    layers, ranks, scales = (jnp.array(column) for column in zip(*chosen, strict=True))

    def one(site: Any) -> tuple[Array, Array]:
        layer, rank, scale = site
        w = weights[layer].astype(jnp.float32).reshape(shape.in_size, shape.out_size)
        u, s, v = _truncated(w, largest, steps, jax.random.fold_in(key, layer), layout)
        root = jnp.sqrt(jnp.where(jnp.arange(largest) < rank, s, 0.0) / scale)
        return u * root, root[:, None] * v

    a, b = jax.lax.map(one, (layers, ranks, scales))
    a = jnp.zeros((count, *a.shape[1:])).at[layers].set(a)
    b = jnp.zeros((count, *b.shape[1:])).at[layers].set(b)
    return {
        "a": a.reshape(count, *shape.in_shape, largest),
        "b": b.reshape(count, largest, *shape.out_shape),
    }


def _truncated(
    w: Float[Array, "i o"], rank: int, steps: int | None, key: Array, layout: Layout
) -> tuple[Float[Array, "i r"], Float[Array, " r"], Float[Array, "r o"]]:
    """The largest `rank` singular values and their vectors."""
    with jax.default_matmul_precision("highest"):
        if steps is None:
            u, s, v = jnp.linalg.svd(layout.constrain(w, None, None), full_matrices=False)
            return u[:, :rank], s[:rank], v[:rank]
        q = jnp.linalg.qr(w @ jax.random.normal(key, (w.shape[1], rank)))[0]

        def iterate(_: Any, q: Array) -> Array:
            return jnp.linalg.qr(w @ jnp.linalg.qr(w.T @ q)[0])[0]

        q = jax.lax.fori_loop(0, steps, iterate, q)
        u, s, v = jnp.linalg.svd(q.T @ w, full_matrices=False)
        return q @ u, s, v
