"""IA3 (arXiv 2205.05638), as PEFT defines it: one learned factor for each feature of a linear's output or input.

y = l * (x W + bias), or for feed-forward modules y = (l * x) W + bias, with l initially 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jora.errors import InputError
from jora.methods.layer_sites import layer_masks, layer_sites
from jora.methods.lora import site_shape
from jora.methods.method import Adapter, Method, ModuleSite, RowsMerger, State
from jora.methods.targets import as_names, checked_choice, full_match
from jora.models.adapted import Bound, Dense, Rows, Site
from jora.models.config import ModelConfig
from jora.models.tensors import linear_shape

if TYPE_CHECKING:
    from jora.methods.served import Served
    from jora.methods.storage import PeftFiles

Side = Literal["input", "output"]  # what of a linear is scaled


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class IA3Projection:
    """The factors of one site; leaves gain a layer axis outside scans."""

    scale: Float[Array, "*features"]
    adapted: Bool[Array, ""]
    side: Side = field(metadata={"static": True})

    def apply(self, x: Array, dense: Dense, site: Site, rows: Rows) -> Array:
        scale = jnp.where(self.adapted, self.scale, 1.0)
        return dense(_scaled(x, scale)) if self.side == "input" else _scaled(dense(x), scale)


def _scaled(x: Float[Array, "b s *features"], scale: Float[Array, "*features"]) -> Float[Array, "b s *features"]:
    return (x.astype(jnp.float32) * scale).astype(x.dtype)


@dataclass(frozen=True)
class IA3(Method):
    """Options of an IA3 adapter, under PEFT's names where PEFT has them.

    targets, exclude_modules: as for `LoRA`, linears of the layers only. feedforward_modules: the targets whose
    input is scaled in place of their output: a name, endings of module names or a regular
    expression.

    A learning rate some ten times LoRA's suits it: the paper trains at 3e-3.
    """

    targets: str | Sequence[str] = ("k_proj", "v_proj", "down_proj")
    feedforward_modules: str | Sequence[str] = ("down_proj",)
    exclude_modules: str | Sequence[str] = ()

    name: ClassVar[str] = "ia3"

    def __post_init__(self) -> None:
        for option in ("targets", "feedforward_modules", "exclude_modules"):
            value = checked_choice(option, getattr(self, option))
            object.__setattr__(self, option, tuple(sorted(value)) if isinstance(value, tuple) else value)

    def chosen(self, config: ModelConfig) -> dict[str, tuple[str, int]]:
        """The adapted modules: {module name: (target, layer)}."""
        return layer_sites("IA3", config, self.targets, self.exclude_modules)

    def sides(self, config: ModelConfig) -> dict[str, Side]:
        """What of each target is scaled. Raises InputError where its layers differ."""
        sides: dict[str, Side] = {}
        for name, (target, _) in self.chosen(config).items():
            side: Side = "input" if _is_named(name, as_names(self.feedforward_modules)) else "output"
            if sides.setdefault(target, side) != side:
                raise InputError(
                    f"IA3: feedforward_modules {self.feedforward_modules!r} names {target} in some of its layers;"
                    " name it in all or in none"
                )
        return sides

    def init(self, model: Any, key: Array) -> Adapter:
        """All factors 1: the base itself."""
        config, layout = model.config, model.layout
        masks = layer_masks(config, self.chosen(config).values())
        ones = {t: {s: jnp.ones((config.layers, *features(config, t, s)))} for t, s in self.sides(config).items()}
        state = State(ones, {target: jnp.asarray(mask) for target, mask in masks.items()})
        state = jax.tree.map(lambda x, a: jax.device_put(x, layout.sharding(a, x.shape)), state, self.axes(config))
        return Adapter(self, state, config, dict(model.identity))

    def axes(self, config: ModelConfig) -> State:
        trained = {t: {side: _axes(config, t, side)} for t, side in self.sides(config).items()}
        return State(trained, {target: (None,) for target in trained})

    def bind(self, state: State, rows: Rows) -> Bound:
        layers = {}
        for target, factors in state.trained.items():
            ((side, scale),) = factors.items()
            layers[target] = IA3Projection(scale, state.constant[target], side)
        return Bound(layers)

    def mergers(self, adapter: Adapter) -> Mapping[ModuleSite, RowsMerger]:
        """Rows (output factors) or columns (input factors) of the weight scaled, and its bias with the rows."""
        mergers: dict[ModuleSite, RowsMerger] = {}
        sides = self.sides(adapter.config)
        for target, layer in self.chosen(adapter.config).values():
            side = sides[target]
            scale = host_factors(adapter, target, side, layer)
            if side == "input":
                mergers[target, layer] = partial(_scale_columns, scale)
                continue
            mergers[target, layer] = partial(_scale_rows, scale)
            if linear_shape(adapter.config, target).bias:
                mergers[f"{target}.bias", layer] = partial(_scale_rows, scale)
        return mergers

    def lower(self, adapter: Adapter, model: Any) -> Served:
        """One product a target, scaled on its input or (the bias with it) on its output."""
        from jora.methods.served import Products, Served, finite, ones

        config, (trained, adapted) = adapter.config, adapter.state
        products = {}
        for target, ((side, scale),) in ((target, factors.items()) for target, factors in trained.items()):
            mask = np.asarray(adapted[target]).reshape(-1, *(1,) * (scale.ndim - 1))
            factors = finite(self.name, target, np.where(mask, np.asarray(scale, np.float32), 1.0)[:, None])
            shape = site_shape(config, target)
            into, out = ones(config, shape.in_shape), ones(config, shape.out_shape)
            products[target] = Products(factors, out) if side == "input" else Products(into, factors)
        return Served(products=products, scales_bias=True)

    def to_peft(self, adapter: Adapter) -> PeftFiles:
        from jora.methods.peft.ia3 import write_peft

        return write_peft(adapter)


def _scale_columns(scale: np.ndarray, block: np.ndarray, rows: slice) -> np.ndarray:
    return block * scale


def _scale_rows(scale: np.ndarray, block: np.ndarray, rows: slice) -> np.ndarray:
    return block * scale[rows].reshape(-1, *(1,) * (block.ndim - 1))  # a bias has no columns


def _is_named(module: str, names: str | Sequence[str]) -> bool:
    """PEFT's rule for feedforward_modules: no dot is needed before an ending."""
    if isinstance(names, str):
        return full_match(names, module)
    return module.endswith(tuple(names))


def features(config: ModelConfig, target: str, side: Side) -> tuple[int, ...]:
    """Shape of one site's factors."""
    shape = linear_shape(config, target)
    return shape.in_shape if side == "input" else shape.out_shape


def _axes(config: ModelConfig, target: str, side: Side) -> tuple[str | None, ...]:
    shape = site_shape(config, target)
    return (None, *(shape.in_axes if side == "input" else shape.out_axes))


def host_factors(adapter: Adapter, target: str, side: Side, layer: int) -> Float[np.ndarray, " features"]:
    """The factors of one module on the host, in Hugging Face's order."""
    return np.asarray(adapter.state.trained[target][side][layer]).reshape(-1)
