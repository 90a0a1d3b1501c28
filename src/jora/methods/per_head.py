"""JORA's own factors (arXiv 2403.11366): every head of q, k or v has a pair A, B of its own.

y[h] = x W[h] + s (dropout(x) A[h]) B[h] with A [embed, heads, r], B [heads, r, head_dim] and s as LoRA's. With A the
same for all heads this is ordinary LoRA, so it contains it; all heads together may reach rank heads * r, and that is
the rank of the plain LoRA that it is exported as. It trains about heads times as many parameters as LoRA of that r.

JORA draws A from N(0, 1); here it is drawn as LoRA's, so that x A is of x's size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jora.errors import InputError
from jora.kernels.on_shards import on_shards
from jora.kernels.widen import widen
from jora.methods.extras.both import without_extras
from jora.methods.initial import first_factors
from jora.methods.lora import LoRA, dropped, site_shape
from jora.methods.method import Adapter, State
from jora.models.adapted import Dense, Rows, Site
from jora.models.config import ModelConfig
from jora.models.tensors import layer_prefix, module_path

HEADED = ("q_proj", "k_proj", "v_proj")  # their outputs are heads


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PerHeadProjection:
    """Factors of one site; *h is [kv, group] for q and [kv] for k and v."""

    a: Float[Array, "d *h r"]
    b: Float[Array, "*h r e"]
    scale: Float[Array, ""]
    dropout: float = field(metadata={"static": True}, default=0.0)

    def apply(self, x: Array, dense: Dense, site: Site, rows: Rows) -> Array:
        heads, width = dense.out_axes[:-1], dense.out_axes[-1]
        axes = [
            ("batch", None, None),
            (None, *dense.out_axes),
            (None, *heads, None),
            (*heads, None, width),
        ]
        draws: list[Array] = []
        if self.dropout and rows.dropout is not None:
            draws = [site.layer, rows.dropout, *(() if rows.tokens is None else (rows.tokens,))]
            axes += [(), ("batch",), ("batch", None)][: len(draws)]

        # The heads are cut over devices, so the gradient of x is a sum over them. With the base's product in the same
        # function it is the base's own sum; alone it would be one more of [tokens, width].
        def both(x: Array, weight: Array, a: Array, b: Array, *draws: Array) -> Array:
            kept = dropped(x, self.dropout, Site(site.target, draws[0]), Rows(*draws[1:])) if draws else x
            return jnp.tensordot(x, weight, axes=1) + per_head(kept, a, b)

        def product(x: Array, weight: Array, a: Array, b: Array, *draws: Array) -> Array:
            out_axes, out_shape = ("batch", None, *dense.out_axes), (*x.shape[:2], *weight.shape[1:])
            return on_shards(both, dense.layout, (x, weight, a, b, *draws), axes, out_axes, out_shape)

        y = dense.with_weight(product, x, self.a, self.b * self.scale, *draws)
        return y if dense.bias is None else y + dense.bias


@dataclass(frozen=True)
class PerHeadLoRA(LoRA):
    """LoRA's options; targets may be q_proj, k_proj and v_proj, by default q and v as in JORA."""

    targets: str | Sequence[str] = ("q_proj", "v_proj")

    name: ClassVar[str] = "per-head"

    def _check_init(self, ranks: Sequence[int]) -> None:
        if self.init_lora_weights not in (True, "gaussian"):
            raise InputError(
                f"per-head: init_lora_weights {self.init_lora_weights!r} is not known; use True or gaussian"
            )

    def sites(self, config: ModelConfig) -> dict[str, dict[int | None, tuple[int, float]]]:
        sites = super().sites(config)
        if other := sorted(sites.keys() - set(HEADED)):
            raise InputError(f"per-head: {other[0]} has no heads in its output; targets may be {', '.join(HEADED)}")
        return sites

    def check_ranks(self, config: ModelConfig) -> None:
        for target, by_layer in self.sites(config).items():
            into, out = site_shape(config, target).in_size, config.head_dim
            rank = max(rank for rank, _ in by_layer.values())
            if rank > min(into, out):
                raise InputError(f"per-head: rank {rank} is above {target}'s heads, each {into} x {out}; lower it")

    def first(self, key: Array, config: ModelConfig, target: str, ranks: int | Sequence[int]) -> dict[str, Array]:
        shape = site_shape(config, target)
        *heads, width = shape.out_shape

        def draw(key: Array) -> Float[Array, "L d r"]:
            return first_factors(key, self.init_lora_weights, shape, ranks)["a"]

        a = jax.vmap(draw, out_axes=2)(jax.random.split(key, math.prod(heads)))
        layers, embed, _, largest = a.shape
        return {
            "a": a.reshape(layers, embed, *heads, largest),
            "b": jnp.zeros((layers, *heads, largest, width), jnp.float32),
        }

    def factor_axes(self, config: ModelConfig, target: str) -> dict[str, tuple[str | None, ...]]:
        *heads, width = site_shape(config, target).out_axes
        return {"a": (None, None, *heads, None), "b": (None, *heads, None, width)}

    def projection(self, target: str, factors: Mapping[str, Array], constant: Any) -> PerHeadProjection:
        return PerHeadProjection(**factors, scale=constant, dropout=self.dropout)

    def to_lora(self, adapter: Adapter) -> Adapter:
        """The same change as a LoRA of rank heads * r: the heads' A beside one another, B block-diagonal."""
        config, pairs = adapter.config, dict(adapter.state.trained)
        ranks: dict[str, int] = {}
        alphas: dict[str, float] = {}
        sites = self.sites(config)
        for target, pair in without_extras(pairs).items():
            pairs[target] = _side_by_side(pair["a"], pair["b"])
            heads = math.prod(site_shape(config, target).out_shape[:-1])
            for layer, (rank, scale) in sites[target].items():
                name = layer_prefix(layer or 0) + module_path(target)
                ranks[name], alphas[name] = heads * rank, scale * heads * rank
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        options |= {"rank_pattern": ranks, "alpha_pattern": alphas, "use_rslora": False, "init_lora_weights": True}
        options["rank"] = max(ranks.values())
        state = State(pairs, adapter.state.constant)
        return dataclasses.replace(adapter, method=LoRA(**options), state=state)


@jax.jit
def _side_by_side(a: Float[Array, "L d *h r"], b: Float[Array, "L *h r e"]) -> dict[str, Array]:
    """a [L, d, r heads], b [L, r heads, *h, e]. The rank is the outer index: true ranks stay before their padding."""
    layers, embed, *heads, rank = a.shape
    count = math.prod(heads)
    a = jnp.swapaxes(a.reshape(layers, embed, count, rank), 2, 3)
    blocks = b.reshape(layers, count, rank, -1)
    diagonal = jnp.einsum("lhre,hH->lrhHe", blocks, jnp.eye(count))
    return {
        "a": a.reshape(layers, embed, rank * count),
        "b": diagonal.reshape(layers, rank * count, *heads, b.shape[-1]),
    }


@jax.custom_vjp
def per_head(
    x: Float[Array, "b s d"], a: Float[Array, "d *h r"], b: Float[Array, "*h r e"]
) -> Float[Array, "b s *h e"]:
    """x A[h] B[h] of every head. Products run in x's dtype with fp32 sums, the factors' gradients leave in fp32."""
    return _forward(x, a, b)[0]


def _forward(x: Array, a: Array, b: Array) -> tuple[Array, Any]:
    h = _letters(b)
    inner = _sum(f"bsd,d{h}r->bs{h}r", x, a.astype(x.dtype)).astype(x.dtype)
    return _sum(f"bs{h}r,{h}re->bs{h}e", inner, b.astype(x.dtype)).astype(x.dtype), (x, inner, a, b)


def _backward(saved: Any, gradient: Array) -> tuple[Array, Array, Array]:
    x, inner, a, b = saved
    h = _letters(b)
    d_inner = _sum(f"bs{h}e,{h}re->bs{h}r", gradient, b.astype(x.dtype)).astype(x.dtype)
    d_b = _sum(f"bs{h}r,bs{h}e->{h}re", inner, gradient)
    d_a = _sum(f"bsd,bs{h}r->d{h}r", x, d_inner)
    return _sum(f"bs{h}r,d{h}r->bsd", d_inner, a.astype(x.dtype)).astype(x.dtype), d_a, d_b


def _letters(b: Array) -> str:
    """Names of the head dimensions: kv and group of q, kv of k and v."""
    return "kg"[: b.ndim - 2]


def _sum(spec: str, x: Array, y: Array) -> Array:
    x, y = widen(x, y)
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


per_head.defvjp(_forward, _backward)
