"""VeRA (arXiv 2310.11454), as PEFT defines it: one frozen random pair of matrices for all layers and targets.

y = x W + b * (B (d * (A dropout(x)))), equation 2 of the paper: A [r, in] and B [out, r] are random and never
trained, the vectors d [r] and b [out] are learned for each linear. Linears of several sizes share one pair of
the largest size and take its first columns and rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jora.errors import InputError
from jora.kernels.widen import widen
from jora.methods.layer_sites import layer_masks, layer_sites
from jora.methods.lora import LoRA, dropped, site_shape
from jora.methods.method import Adapter, Method, State
from jora.methods.targets import checked_choice
from jora.models.adapted import Bound, Dense, Rows, Site
from jora.models.config import ModelConfig
from jora.models.tensors import LinearShape, linear_shape
from jora.sharding import Layout

if TYPE_CHECKING:
    from jora.methods.storage import PeftFiles


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class VeRAProjection:
    """The learned vectors of one site; leaves gain a layer axis outside scans. The matrices come with the Site."""

    d: Float[Array, " r"]
    b: Float[Array, "*out"]
    adapted: Bool[Array, ""]
    dropout: float = field(metadata={"static": True}, default=0.0)

    def apply(self, x: Array, dense: Dense, site: Site, rows: Rows) -> Array:
        y = dense(x)
        x = dropped(x, self.dropout, site, rows)
        a, b = cut(site.shared, LinearShape(x.shape[2:], dense.in_axes, y.shape[2:], dense.out_axes), dense.layout)
        inner = _product(x, a, dense.inputs) * self.d
        inner = dense.layout.constrain(inner.astype(x.dtype), "batch", None, None)
        return y + (_product(inner, b, 1) * jnp.where(self.adapted, self.b, 0.0)).astype(y.dtype)


def cut(projections: Mapping[str, Array], shape: LinearShape, layout: Layout) -> tuple[Array, Array]:
    """What one linear uses of A [largest in, r] and B [r, largest out]: [*in, r] and [r, *out].

    The matrices lie whole on every device, so that each takes its own part without any communication: along
    heads and MLP as the weight is cut, along the model width all of it.
    """
    ins, outs = ([None if a == "embed" else a for a in axes] for axes in (shape.in_axes, shape.out_axes))
    a = projections["a"][: shape.in_size].reshape(*shape.in_shape, -1)
    b = projections["b"][:, : shape.out_size].reshape(-1, *shape.out_shape)
    return layout.constrain(a, *ins, None), layout.constrain(b, None, *outs)


def _product(x: Array, matrix: Array, contracted: int) -> Array:
    """x . matrix in x's dtype with fp32 sums; the last `contracted` dimensions of x meet the matrix's first."""
    x, matrix = widen(x, matrix.astype(x.dtype))
    return jnp.tensordot(x, matrix, axes=contracted, preferred_element_type=jnp.float32)


@dataclass(frozen=True)
class VeRA(Method):
    """Options of a VeRA adapter.

    rank: of the random matrices; as only vectors are trained it may be far larger than LoRA's. targets and
    layers_to_transform: as for `LoRA`, linears of the layers only. dropout: rate on the adapter's input.
    d_initial: first value of every d. projection_prng_key: seed of the random matrices; adapters that share
    it (and their shapes) share the matrices. The matrices are stored with the adapter: PEFT's generator is
    another one.

    It suits rates far above LoRA's: ten times in the paper (appendix A), more on little data (docs/methods.md).
    """

    rank: int = 256
    targets: str | Sequence[str] = "all-linear"
    dropout: float = 0.0
    d_initial: float = 0.1
    projection_prng_key: int = 0
    layers_to_transform: int | Sequence[int] | None = None

    name: ClassVar[str] = "vera"

    def __post_init__(self) -> None:
        for option in ("targets", "layers_to_transform"):
            value = checked_choice(option, getattr(self, option))
            object.__setattr__(self, option, tuple(sorted(value)) if isinstance(value, tuple) else value)
        if self.rank < 1:
            raise InputError(f"VeRA: the rank must be at least 1, found {self.rank}")
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"VeRA: dropout must be in [0, 1), found {self.dropout}")

    def chosen(self, config: ModelConfig) -> dict[str, tuple[str, int]]:
        """The adapted modules: {module name: (target, layer)}."""
        return layer_sites("VeRA", config, self.targets, layers=self.layers_to_transform)

    def sizes(self, config: ModelConfig) -> tuple[int, int]:
        """(largest input, largest output) of the adapted linears: the sizes of A and B."""
        shapes = [linear_shape(config, target) for target, _ in self.chosen(config).values()]
        return max(s.in_size for s in shapes), max(s.out_size for s in shapes)

    def init(self, model: Any, key: Array) -> Adapter:
        """d = `d_initial`, b = 0; A and B uniform in +-sqrt(6 / inputs) from `projection_prng_key`, as in PEFT."""
        state = _draw(self, model.config, model.layout)
        return Adapter(self, state, model.config, dict(model.identity))

    def axes(self, config: ModelConfig) -> State:
        targets = layer_masks(config, self.chosen(config).values())
        trained = {t: {"d": (None, None), "b": (None, *site_shape(config, t).out_axes)} for t in targets}
        whole = {"a": (None, None), "b": (None, None)}
        return State(trained, {"projections": whole, "adapted": {t: (None,) for t in targets}})

    def bind(self, state: State, rows: Rows) -> Bound:
        layers = {
            target: VeRAProjection(vectors["d"], vectors["b"], state.constant["adapted"][target], self.dropout)
            for target, vectors in state.trained.items()
        }
        return Bound(layers, shared=state.constant["projections"])

    def to_lora(self, adapter: Adapter) -> Adapter:
        """A scaled by d and B scaled by b, as the factors of a LoRA of the same rank and scale 1."""
        method = LoRA(
            rank=self.rank,
            alpha=self.rank,
            targets=self.targets,
            dropout=self.dropout,
            layers_to_transform=self.layers_to_transform,
        )
        state = _fold(adapter.state, adapter.config)
        return Adapter(method, state, adapter.config, adapter.base)

    def to_peft(self, adapter: Adapter) -> PeftFiles:
        from jora.methods.peft.vera import write_peft

        return write_peft(adapter)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _draw(method: VeRA, config: ModelConfig, layout: Layout) -> State:
    rank, (largest_in, largest_out) = method.rank, method.sizes(config)
    keys = jax.random.split(jax.random.key(method.projection_prng_key))
    projections = {
        "a": _uniform(keys[0], (largest_in, rank), largest_in),
        "b": _uniform(keys[1], (rank, largest_out), rank),
    }
    masks = layer_masks(config, method.chosen(config).values())
    trained = {
        target: {
            "d": jnp.full((config.layers, rank), method.d_initial, jnp.float32),
            "b": jnp.zeros((config.layers, *linear_shape(config, target).out_shape), jnp.float32),
        }
        for target in masks
    }
    state = State(trained, {"projections": projections, "adapted": jax.tree.map(jnp.asarray, masks)})
    return jax.tree.map(lambda leaf, axes: layout.constrain(leaf, *axes), state, method.axes(config))


def _uniform(key: Array, shape: tuple[int, int], inputs: int) -> Float[Array, "n m"]:
    bound = math.sqrt(6.0 / inputs)
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


@partial(jax.jit, static_argnums=1)
def _fold(state: State, config: ModelConfig) -> State:
    """The vectors multiplied into the matrices, stacked over layers as LoRA's factors are."""
    projections, trained, scale = state.constant["projections"], {}, {}
    for target, vectors in state.trained.items():
        shape = linear_shape(config, target)
        a = projections["a"][: shape.in_size] * vectors["d"][:, None]
        b = projections["b"][:, : shape.out_size].reshape(-1, *shape.out_shape) * vectors["b"][:, None]
        scale[target] = state.constant["adapted"][target].astype(jnp.float32)
        trained[target] = {"a": a.reshape(-1, *shape.in_shape, a.shape[-1]), "b": b}
    return State(trained, scale)


def host_projections(adapter: Adapter) -> tuple[np.ndarray, np.ndarray]:
    """A [r, largest input] and B [largest output, r] in PEFT's layout, on the host."""
    projections = adapter.state.constant["projections"]
    return np.asarray(projections["a"]).T, np.asarray(projections["b"]).T
