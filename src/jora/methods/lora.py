"""LoRA (arXiv 2106.09685) with rsLoRA scaling (arXiv 2312.03732), as PEFT defines it.

y = x W + s (dropout(x) A) B with A [in, r], B [r, out] and s = alpha / r (rsLoRA: alpha / sqrt(r)).

Layers and targets may have different ranks: within one target the factors are zero-padded to the largest
rank in A *and* in B. Both gradients of a padded component are then exactly zero, so padding stays zero.
The scale is an array over layers, 0 where a layer is not adapted. Files and counts use the true ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jora.errors import InputError
from jora.kernels.counter_hash import keep_mask
from jora.kernels.low_rank import low_rank
from jora.methods.method import Adapter, State
from jora.methods.targets import EMBED, HEAD, Frozen, pattern_value, select
from jora.models.adapted import Bound, Dense, Rows, Site
from jora.models.config import ModelConfig
from jora.models.tensors import LinearShape, linear_shape
from jora.sharding import Layout


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoRAProjection:
    """Factors of one site. `scale` is 0 where the layer is not adapted; leaves gain a layer axis outside scans."""

    a: Float[Array, "*in r"]
    b: Float[Array, "r *out"]
    scale: Float[Array, ""]
    dropout: float = field(metadata={"static": True}, default=0.0)

    def apply(self, x: Array, dense: Dense, site: Site, rows: Rows) -> Array:
        y = dense(x)
        if self.dropout and rows.dropout is not None:
            keep = keep_mask(site.salt(rows.dropout), x.shape, self.dropout, rows.tokens)
            x = jnp.where(keep, x, 0) / jnp.asarray(1 - self.dropout, x.dtype)
        # The scale goes onto the small factor; the product of an unadapted layer is exactly zero.
        return y + low_rank(x, self.a, self.b * self.scale, dense.layout)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoRAEmbedding:
    """LoRA of the embedding table: A has a row per word (initially zero), B maps rank to width."""

    a: Float[Array, "vocab r"]
    b: Float[Array, "r d"]
    scale: Float[Array, ""]

    def embed(self, tokens: Int[Array, "b s"], vectors: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        inner = (self.a.at[tokens].get(mode="clip") * self.scale).astype(vectors.dtype)
        return vectors + jnp.tensordot(inner, self.b.astype(vectors.dtype), axes=1)


@dataclass(frozen=True)
class LoRA:
    """Options of a LoRA adapter, under PEFT's names where PEFT has them.

    rank: columns of A. alpha: scale numerator. targets: "all-linear", a name, a list of names or a regular
    expression over module names; embed_tokens and lm_head may be named. dropout: rate on the adapter's
    input. use_rslora: scale alpha / sqrt(r). rank_pattern / alpha_pattern: {module pattern: value}.
    layers_to_transform: adapt these layers only. exclude_modules: names or a regular expression.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: str | Sequence[str] = "all-linear"
    dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: int | Sequence[int] | None = None
    exclude_modules: str | Sequence[str] = ()

    name: ClassVar[str] = "lora"
    identity: ClassVar[Literal["exact"]] = "exact"

    def __post_init__(self) -> None:
        for option in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, option, Frozen(getattr(self, option)))
        for option in ("targets", "exclude_modules", "layers_to_transform"):
            value = getattr(self, option)
            if isinstance(value, list | tuple | set):
                object.__setattr__(self, option, tuple(sorted(value) if isinstance(value, set) else value))
        ranks = [self.rank, *self.rank_pattern.values()]
        if any(r < 1 for r in ranks):
            raise InputError(f"LoRA: a rank must be at least 1, found {min(ranks)}")
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"LoRA: dropout must be in [0, 1), found {self.dropout}")

    def sites(self, config: ModelConfig) -> dict[str, dict[int | None, tuple[int, float]]]:
        """{target: {layer: (true rank, scale)}}; layer is None for embed_tokens and lm_head."""
        chosen: dict[str, dict[int | None, tuple[int, float]]] = {}
        for name, (target, layer) in select(
            config, self.targets, self.exclude_modules, self.layers_to_transform
        ).items():
            rank = pattern_value(self.rank_pattern, name, self.rank)
            alpha = pattern_value(self.alpha_pattern, name, self.alpha)
            scale = alpha / (math.sqrt(rank) if self.use_rslora else rank)
            chosen.setdefault(target, {})[layer] = (rank, scale)
        return chosen

    def init(self, model: Any, key: Array) -> Adapter:
        """A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0 (embeddings: A = 0, B ~ N(0, 1)), as PEFT initialises."""
        state = _draw(key, self, model.config, model.layout)
        return Adapter(self, state, model.config, dict(model.identity))

    def axes(self, config: ModelConfig) -> State:
        sites = self.sites(config)
        return State(
            {t: _factor_axes(config, t) for t in sites},
            {t: (None,) * len(_scales_shape(config, by_layer)) for t, by_layer in sites.items()},
        )

    def bind(self, state: State, rows: Rows) -> Bound:
        layers: dict[str, Any] = {}
        ends: dict[str, Any] = {}
        for target, factors in state.trained.items():
            scale = state.constant[target]
            if target == EMBED:
                ends[EMBED] = LoRAEmbedding(factors["a"], factors["b"], scale)
                continue
            projection = LoRAProjection(factors["a"], factors["b"], scale, self.dropout)
            (ends if target == HEAD else layers)[target] = projection
        return Bound(layers, ends.get(EMBED), ends.get(HEAD))


@partial(jax.jit, static_argnums=(1, 2, 3))
def _draw(key: Array, method: LoRA, config: ModelConfig, layout: Layout) -> State:
    """Initial factors, each device drawing its own part."""
    sites = method.sites(config)
    keys = jax.random.split(key, len(sites))
    pairs = {t: _init_pair(k, config, t, by_layer) for k, (t, by_layer) in zip(keys, sites.items(), strict=True)}
    state = State(pairs, {t: _scales(config, by_layer) for t, by_layer in sites.items()})
    return jax.tree.map(lambda leaf, axes: layout.constrain(leaf, *axes), state, method.axes(config))


def site_shape(config: ModelConfig, target: str) -> LinearShape:
    """Input and output of a target, lm_head and embed_tokens included, with the axes of *adapter factors*.

    The vocabulary is padded as the table is (`ModelConfig.padded_vocab`). Along the model width a factor is
    whole on every device; along heads, MLP and vocabulary it is cut as the weight is.
    """
    vocab, width = ((config.padded_vocab,), ("vocab",)), ((config.embed,), (None,))
    if target == HEAD:
        return LinearShape(*width, *vocab)
    if target == EMBED:
        return LinearShape(*vocab, *width)
    s = linear_shape(config, target)
    whole = {"embed": None}
    return LinearShape(
        s.in_shape,
        tuple(whole.get(a or "", a) for a in s.in_axes),
        s.out_shape,
        tuple(whole.get(a or "", a) for a in s.out_axes),
    )


def _factor_axes(config: ModelConfig, target: str) -> dict[str, tuple[str | None, ...]]:
    s = site_shape(config, target)
    stack: tuple[str | None, ...] = () if target in (EMBED, HEAD) else (None,)
    return {"a": (*stack, *s.in_axes, None), "b": (*stack, None, *s.out_axes)}


def _scales_shape(config: ModelConfig, by_layer: Mapping[int | None, Any]) -> tuple[int, ...]:
    return () if None in by_layer else (config.layers,)


def _scales(config: ModelConfig, by_layer: Mapping[int | None, tuple[int, float]]) -> Float[Array, "..."]:
    if None in by_layer:
        return jnp.float32(by_layer[None][1])
    return jnp.array([by_layer.get(layer, (0, 0.0))[1] for layer in range(config.layers)], jnp.float32)


def _init_pair(
    key: Array, config: ModelConfig, target: str, by_layer: Mapping[int | None, tuple[int, float]]
) -> dict[str, Array]:
    s = site_shape(config, target)
    largest = max(rank for rank, _ in by_layer.values())
    if target == EMBED:
        normal = jax.random.normal(key, (largest, *s.out_shape), jnp.float32)
        return {"a": jnp.zeros((*s.in_shape, largest), jnp.float32), "b": normal}
    stack = () if target == HEAD else (config.layers,)
    bound = 1.0 / math.sqrt(s.in_size)
    a = jax.random.uniform(key, (*stack, *s.in_shape, largest), jnp.float32, -bound, bound)
    if stack:
        ranks = jnp.array([by_layer.get(layer, (0, 0.0))[0] for layer in range(config.layers)])
        true = jnp.arange(largest) < ranks.reshape(-1, *(1,) * (a.ndim - 1))
        a = jnp.where(true, a, 0.0)
    return {"a": a, "b": jnp.zeros((*stack, largest, *s.out_shape), jnp.float32)}
