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
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jora.errors import InputError
from jora.kernels.counter_hash import keep_mask
from jora.kernels.low_rank import low_rank
from jora.methods.extras.both import (
    base_with_extras,
    bind_extras,
    check_extras,
    extra_axes,
    is_saved,
    with_extras,
    without_extras,
)
from jora.methods.extras.tokens import canonical
from jora.methods.initial import first_embedding, first_factors
from jora.methods.method import Adapter, Method, ModuleSite, RowsMerger, State
from jora.methods.targets import EMBED, HEAD, Frozen, checked_choice, pattern_value, select
from jora.models.adapted import Bound, Dense, Rows, Site
from jora.models.config import ModelConfig
from jora.models.params import Params
from jora.models.tensors import LinearShape, linear_shape
from jora.sharding import Layout

if TYPE_CHECKING:
    from jora.methods.storage import PeftFiles


def dropped(x: Float[Array, "b s *in"], rate: float, site: Site, rows: Rows) -> Float[Array, "b s *in"]:
    """The adapter's input: x with dropout where the rows have seeds, else x itself."""
    if not rate or rows.dropout is None:
        return x
    keep = keep_mask(site.salt(rows.dropout), x.shape, rate, rows.tokens)
    return jnp.where(keep, x, 0) / jnp.asarray(1 - rate, x.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoRAProjection:
    """Factors of one site. `scale` is 0 where the layer is not adapted; leaves gain a layer axis outside scans."""

    a: Float[Array, "*in r"]
    b: Float[Array, "r *out"]
    scale: Float[Array, ""]
    dropout: float = field(metadata={"static": True}, default=0.0)

    def apply(self, x: Array, dense: Dense, site: Site, rows: Rows) -> Array:
        kept = dropped(x, self.dropout, site, rows)
        # The scale goes onto the small factor; the product of an unadapted layer is exactly zero.
        return dense(x) + low_rank(kept, self.a, self.b * self.scale, dense.layout)


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
class LoRA(Method):
    """Options of a LoRA adapter, under PEFT's names where PEFT has them.

    rank: columns of A. alpha: scale numerator. targets: "all-linear", a name, a list of names or a regular
    expression over module names; embed_tokens and lm_head may be named. dropout: rate on the adapter's
    input. use_rslora: scale alpha / sqrt(r). rank_pattern / alpha_pattern: {module pattern: value}.
    layers_to_transform: adapt these layers only. exclude_modules: names or a regular expression.
    init_lora_weights: True, "gaussian" or "orthogonal" (see `initial`), or "loftq". loraplus_lr_ratio: LoRA+ (arXiv
    2402.12354): B learns at this multiple of the learning rate (PEFT's create_loraplus_optimizer); an
    embedding's factors, whose roles are swapped, keep the rate itself. modules_to_save: endings of module names
    that train whole, as copies (see `extras.modules`). trainable_token_indices: words whose rows of embed_tokens
    train, or {"embed_tokens": words, "lm_head": words} (see `extras.tokens`).
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
    init_lora_weights: bool | str = True
    loraplus_lr_ratio: float = 1.0
    modules_to_save: Sequence[str] = ()
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None

    name: ClassVar[str] = "lora"
    magnitudes: ClassVar[bool] = False  # DoRA's: has a magnitude for every output feature

    def __post_init__(self) -> None:
        for option in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, option, Frozen(getattr(self, option)))
        for option in ("targets", "exclude_modules", "layers_to_transform"):
            object.__setattr__(self, option, checked_choice(option, getattr(self, option)))
        saved = checked_choice("modules_to_save", self.modules_to_save)
        object.__setattr__(self, "modules_to_save", (saved,) if isinstance(saved, str) else tuple(sorted(saved)))
        object.__setattr__(self, "trainable_token_indices", canonical(self.trainable_token_indices))
        ranks = [self.rank, *self.rank_pattern.values()]
        if any(r < 1 for r in ranks):
            raise InputError(f"LoRA: a rank must be at least 1, found {min(ranks)}")
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"LoRA: dropout must be in [0, 1), found {self.dropout}")
        if not 0.0 < self.loraplus_lr_ratio < math.inf:
            raise InputError(f"LoRA: loraplus_lr_ratio must be above 0, found {self.loraplus_lr_ratio}")
        self._check_init(ranks)

    def _check_init(self, ranks: Sequence[int]) -> None:
        """Raise InputError for an initialisation that this method does not have."""
        init = self.init_lora_weights
        if isinstance(init, str) and init.startswith("pissa"):
            raise InputError(f"{self.name}: init_lora_weights {init!r} is a method of its own here: choose pissa")
        known = (True, "gaussian", "orthogonal", "loftq")
        if init not in known:
            raise InputError(f"{self.name}: init_lora_weights {init!r} is not known; use one of {known}")
        if init == "loftq" and not all(a > 0 for a in (self.alpha, *self.alpha_pattern.values())):
            raise InputError(f"{self.name}: init_lora_weights loftq needs an alpha above 0")
        if init == "orthogonal" and (odd := [r for r in ranks if r % 2]):
            raise InputError(f"{self.name}: init_lora_weights orthogonal needs even ranks, found {odd[0]}")

    def sites(self, config: ModelConfig) -> dict[str, dict[int | None, tuple[int, float]]]:
        """{target: {layer: (true rank, scale)}}; layer is None for embed_tokens and lm_head."""
        chosen: dict[str, dict[int | None, tuple[int, float]]] = {}
        for name, (target, layer) in select(
            config, self.targets, self.exclude_modules, self.layers_to_transform
        ).items():
            if is_saved(self, name):
                continue
            rank = pattern_value(self.rank_pattern, name, self.rank)
            alpha = pattern_value(self.alpha_pattern, name, self.alpha)
            scale = alpha / (math.sqrt(rank) if self.use_rslora else rank)
            chosen.setdefault(target, {})[layer] = (rank, scale)
        if self.modules_to_save or self.trainable_token_indices:
            check_extras(self, config, [(target, layer) for target, by_layer in chosen.items() for layer in by_layer])
        return chosen

    def check_ranks(self, config: ModelConfig) -> None:
        for target, by_layer in self.sites(config).items():
            check_rank(self.name, config, target, max(rank for rank, _ in by_layer.values()))

    def init(self, model: Any, key: Array) -> Adapter:
        """A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0 (embeddings: A = 0, B ~ N(0, 1)), or as `init_lora_weights` says."""
        if self.init_lora_weights == "loftq" and not isinstance(model.params.embed, jax.ShapeDtypeStruct):
            from jora.methods.loftq import loftq_state

            state = loftq_state(self, model)
        else:
            state = _draw(key, self, model.config, model.layout)
        return with_extras(Adapter(self, state, model.config, dict(model.identity)), model)

    def first(self, key: Array, config: ModelConfig, target: str, ranks: int | Sequence[int]) -> dict[str, Array]:
        """The first factors of one target; `ranks` are the layers', or one rank for embed_tokens and lm_head."""
        shape = site_shape(config, target)
        if target != EMBED:
            return first_factors(key, self.init_lora_weights, shape, ranks)
        if self.init_lora_weights == "orthogonal":
            raise InputError(f"{self.name}: init_lora_weights orthogonal does not apply to {EMBED}; leave it out")
        assert isinstance(ranks, int)
        return first_embedding(key, shape, ranks)

    def factor_axes(self, config: ModelConfig, target: str) -> dict[str, tuple[str | None, ...]]:
        """Logical axes of one target's factors."""
        s = site_shape(config, target)
        stack: tuple[str | None, ...] = () if target in (EMBED, HEAD) else (None,)
        return {"a": (*stack, *s.in_axes, None), "b": (*stack, None, *s.out_axes)}

    def rates(self, trained: Any) -> Any:
        if self.loraplus_lr_ratio == 1.0:
            return None
        return jax.tree.map_with_path(lambda path, _: self._rate(*(getattr(k, "key", None) for k in path)), trained)

    def _rate(self, *path: Any) -> float:
        # PEFT's groups: what is called lora_B, and every vector (DoRA's magnitude).
        return self.loraplus_lr_ratio if path[-1] in ("b", "magnitude") and path[-2] != EMBED else 1.0

    def axes(self, config: ModelConfig) -> State:
        sites = self.sites(config)
        extras = extra_axes(self, config)
        return State(
            {t: self.factor_axes(config, t) for t in sites} | extras.trained,
            {t: (None,) * len(_scales_shape(config, by_layer)) for t, by_layer in sites.items()} | extras.constant,
        )

    def bind(self, state: State, rows: Rows) -> Bound:
        layers: dict[str, Any] = {}
        ends: dict[str, Any] = {}
        for target, factors in without_extras(state.trained).items():
            projection = self.projection(target, factors, state.constant[target])
            (ends if target in (EMBED, HEAD) else layers)[target] = projection
        return bind_extras(state, Bound(layers, ends.get(EMBED), ends.get(HEAD)))

    def projection(self, target: str, factors: Mapping[str, Array], constant: Any) -> Any:
        """One target's part of `Bound`, from its trained leaves and its constants."""
        if target == EMBED:
            return LoRAEmbedding(**factors, scale=constant)
        return LoRAProjection(**factors, scale=constant, dropout=self.dropout)

    def base(self, state: State, params: Params) -> Params:
        return base_with_extras(state, params)

    def to_lora(self, adapter: Adapter) -> Adapter:
        return adapter

    def mergers(self, adapter: Adapter) -> Mapping[ModuleSite, RowsMerger]:
        from jora.methods.factors import lora_mergers

        return lora_mergers(self.to_lora(adapter))

    def to_peft(self, adapter: Adapter) -> PeftFiles:
        from jora.methods.peft.lora import write_peft

        return write_peft(self.to_lora(adapter))


@partial(jax.jit, static_argnums=(1, 2, 3))
def _draw(key: Array, method: LoRA, config: ModelConfig, layout: Layout) -> State:
    """Initial factors, each device drawing its own part."""
    sites = method.sites(config)
    keys = jax.random.split(key, len(sites))
    pairs = {
        t: method.first(k, config, t, _ranks(config, by_layer))
        for k, (t, by_layer) in zip(keys, sites.items(), strict=True)
    }
    for target, pair in pairs.items():
        axes = method.factor_axes(config, target)
        pairs[target] = {name: layout.constrain(factor, *axes[name]) for name, factor in pair.items()}
    return State(pairs, {t: _scales(config, by_layer) for t, by_layer in sites.items()})


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


def true_sizes(config: ModelConfig, target: str) -> tuple[int, int]:
    """Inputs and outputs of a target as files know it: without the padding of the vocabulary."""
    shape = site_shape(config, target)
    into = config.vocab_size if target == EMBED else shape.in_size
    return into, config.vocab_size if target == HEAD else shape.out_size


def check_rank(method: str, config: ModelConfig, target: str, rank: int) -> None:
    """Raise InputError for a rank above the smaller side of a target's matrix."""
    into, out = true_sizes(config, target)
    if rank > min(into, out):
        raise InputError(f"{method}: rank {rank} is above {target}, which is {into} x {out}; lower it")


def _scales_shape(config: ModelConfig, by_layer: Mapping[int | None, Any]) -> tuple[int, ...]:
    return () if None in by_layer else (config.layers,)


def _scales(config: ModelConfig, by_layer: Mapping[int | None, tuple[int, float]]) -> Float[Array, "..."]:
    if None in by_layer:
        return jnp.float32(by_layer[None][1])
    return jnp.array([by_layer.get(layer, (0, 0.0))[1] for layer in range(config.layers)], jnp.float32)


def _ranks(config: ModelConfig, by_layer: Mapping[int | None, tuple[int, float]]) -> int | tuple[int, ...]:
    if None in by_layer:
        return by_layer[None][0]
    return tuple(by_layer.get(layer, (0, 0.0))[0] for layer in range(config.layers))
