"""DoRA (arXiv 2402.09353), as PEFT computes it: a LoRA whose output features keep a magnitude of their own.

W' = m * V / |V| with V = W + s A B, the norm taken over the inputs of each output feature (equation 5). |V| changes
with A and B but gets no gradient (section 4.3), which saves the memory of a backward pass through V:

    y = x W + (m / |V| - 1) (x W) + (m / |V|) s (x A) B

With dropout the second and third terms read dropout(x), as in PEFT; the base's product is then taken twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jora.errors import InputError
from jora.kernels.low_rank import low_rank
from jora.methods.extras.both import without_extras
from jora.methods.lora import LoRA, dropped, site_shape
from jora.methods.method import Adapter, Method, ModuleSite, RowsMerger, State
from jora.methods.targets import EMBED, HEAD
from jora.models import decoder, head
from jora.models.adapted import Dense, Rows, Site
from jora.models.config import ModelConfig
from jora.models.params import Params
from jora.sharding import Layout

if TYPE_CHECKING:
    from jora.methods.served import Served
    from jora.methods.storage import PeftFiles


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DoRAProjection:
    """Factors and magnitudes of one site. `scale` is 0 where the layer is not adapted."""

    a: Float[Array, "*in r"]
    b: Float[Array, "r *out"]
    magnitude: Float[Array, "*out"]
    scale: Float[Array, ""]
    dropout: float = field(metadata={"static": True}, default=0.0)

    def apply(self, x: Array, dense: Dense, site: Site, rows: Rows) -> Array:
        kept = dropped(x, self.dropout, site, rows)
        plain = dataclasses.replace(dense, bias=None)  # the bias is not scaled
        base = plain(kept)
        y = dense(x) if kept is not x else base if dense.bias is None else base + dense.bias
        b = self.b * self.scale
        ratio = self._ratio(_norm(dense, self.a, b))
        # In fp32: what is left of (ratio - 1) in 16 bits is rounded once, with the sum.
        change = (ratio - 1) * base + ratio * low_rank(kept, self.a, b, dense.layout)
        return (y + change).astype(y.dtype)

    def _ratio(self, norm: Float[Array, "*out"]) -> Float[Array, "*out"]:
        """m / |V|; 1 where the layer is not adapted, or a column is zero and stays so."""
        acts = (norm > 0) & (self.scale != 0)
        return jnp.where(acts, self.magnitude / jnp.where(norm > 0, norm, 1.0), 1.0)


def _norm(dense: Dense, a: Float[Array, "*in r"], b: Float[Array, "r *out"]) -> Float[Array, "*out"]:
    """|W + A B| without a gradient. Along the model width it is whole on every device, as the factors are.

    The sum over the weight's shards takes parts of A and B. Unless they are said to be whole before, the compiler
    cuts them for their other uses too, and collects them for each.
    """
    outer = tuple(None if axis == "embed" else axis for axis in dense.in_axes + dense.out_axes)
    into, out = outer[: dense.inputs], outer[dense.inputs :]
    constrain = dense.layout.constrain
    a, b = constrain(jax.lax.stop_gradient(a), *into, None), constrain(jax.lax.stop_gradient(b), None, *out)
    return constrain(jax.lax.stop_gradient(dense.column_norm(a, b)), *out)


@dataclass(frozen=True)
class DoRA(LoRA):
    """LoRA's options; trains a magnitude for every output feature beside A and B.

    The embedding's table cannot be adapted: its magnitudes would be of norms over the whole vocabulary, read again
    in every step. lm_head can.
    """

    name: ClassVar[str] = "dora"
    magnitudes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all((self.alpha, *self.alpha_pattern.values())):
            raise InputError(
                "dora: alpha must not be 0, which says here that a layer is not adapted; leave the layer out"
            )

    def sites(self, config: ModelConfig) -> dict[str, dict[int | None, tuple[int, float]]]:
        sites = super().sites(config)
        if EMBED in sites:
            raise InputError(f"dora: {EMBED} cannot be adapted; name the other targets, or use lora")
        return sites

    def init(self, model: Any, key: Array) -> Adapter:
        """LoRA's factors, and m = |W|: step 0 is the base, up to rounding."""
        plain = super().init(model, key)
        trained, scales = plain.state
        pairs = without_extras(trained)
        if isinstance(model.params.embed, jax.ShapeDtypeStruct):  # an estimate: shapes in place of weights
            norms = {t: jnp.sum(pair["b"], axis=-1 - _outputs(model.config, t)) for t, pair in pairs.items()}
        else:
            norms = _norms(model.params, pairs, scales, self, model.config, model.layout)
        trained = {**trained, **{t: {**pair, "magnitude": norms[t]} for t, pair in pairs.items()}}
        return dataclasses.replace(plain, state=State(trained, scales))

    def factor_axes(self, config: ModelConfig, target: str) -> dict[str, tuple[str | None, ...]]:
        axes = super().factor_axes(config, target)
        rank = -1 - _outputs(config, target)
        return {**axes, "magnitude": (*axes["b"][:rank], *axes["b"][rank:][1:])}

    def projection(self, target: str, factors: Mapping[str, Array], constant: Any) -> DoRAProjection:
        return DoRAProjection(**factors, scale=constant, dropout=self.dropout)

    def to_lora(self, adapter: Adapter) -> Adapter:
        """Raises InputError: scaling every output feature is not a change of low rank."""
        return Method.to_lora(self, adapter)

    def mergers(self, adapter: Adapter) -> Mapping[ModuleSite, RowsMerger]:
        from jora.methods.factors import lora_mergers

        return lora_mergers(adapter)

    def lower(self, adapter: Adapter, model: Any) -> Served:
        """One product scaled by c = m / |V|, and A with c s B; the bias is not scaled, as in training."""
        from jora.methods.served import LowRank, Products, Served, check_targets, finite, low_rank_of, ones

        config, (trained, scales) = adapter.config, adapter.state
        check_targets(self.name, trained)
        norms = _norms(model.params, trained, scales, self, config, model.layout)
        low_rank, products = {}, {}
        for target, leaves in trained.items():
            pair = low_rank_of(self.name, target, leaves["a"], leaves["b"], scales[target])
            norm = np.asarray(norms[target])
            acts = (norm > 0) & (np.asarray(scales[target]) != 0).reshape(-1, *(1,) * (norm.ndim - 1))
            ratio = np.divide(np.asarray(leaves["magnitude"]), norm, out=np.ones_like(norm), where=acts)[:, None]
            low_rank[target] = LowRank(pair.a, pair.b * ratio)
            u = ones(config, site_shape(config, target).in_shape)
            products[target] = Products(u, finite(self.name, target, ratio))
        return Served(low_rank, products)

    def to_peft(self, adapter: Adapter) -> PeftFiles:
        from jora.methods.peft.lora import write_peft

        return write_peft(adapter)


def _outputs(config: ModelConfig, target: str) -> int:
    """Number of output dimensions: what stands behind B's rank."""
    return len(site_shape(config, target).out_shape)


@partial(jax.jit, static_argnums=(3, 4, 5))
def _norms(
    params: Params, pairs: Any, scales: Any, method: DoRA, config: ModelConfig, layout: Layout
) -> dict[str, Float[Array, "..."]]:
    """|W + s A B| of every adapted target, [layers?, *out], by the code that every step runs."""
    context = decoder.Context(config, layout, (), None, Rows())

    def norm(dense: Dense, pair: Any, scale: Array) -> Array:
        return jnp.where(scale != 0, dense.column_norm(pair["a"], pair["b"] * scale), 0.0)

    found = {}
    for target, pair in pairs.items():
        if target == HEAD:
            found[target] = norm(head.dense_of(params, layout), pair, scales[target])
            continue

        def one(xs: Any, target: str = target) -> Array:
            layer, pair, scale = xs
            return norm(decoder.dense_of(layer, target, context), pair, scale)

        found[target] = jax.lax.map(one, (params.layers, pair, scales[target]))
    return {t: layout.constrain(n, *method.factor_axes(config, t)["magnitude"]) for t, n in found.items()}
