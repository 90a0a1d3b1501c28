"""NOLA (arXiv 2310.02556): LoRA whose factors are linear combinations of random bases that a seed gives.

    A = A0 + k^-1/2 sum_i a_i A_i,   B = k^-1/2 sum_i b_i B_i,   y = x W + (alpha / r) (x A) B

with A_i and B_i of (nearly) uniform elements in (-1, 1) (`kernels.random_basis`). Only a and b train: 2 k numbers a
linear, whatever its size and rank. What a file holds is them and the seed.

Two ways to start with a change of zero and a gradient that is not:
  offset  A0 ~ U(-1/sqrt(in), 1/sqrt(in)), drawn from the seed for each linear and fixed; a = b = 0. What the
          reference's scripts train.
  pure    A0 = 0, a ~ N(0, 1/in), so that A's elements have LoRA's variance; b = 0. The paper's equations.

Training draws the bases in every forward pass (of each micro-batch), outside the scan over layers; generation and
evaluation draw them once, and run the factors. `shared`: every linear uses the same ones (element number
unit * r + column of A's basis i is the same wherever it occurs), so a chunk of them serves all layers in one matrix
product. `unique`: every linear of every layer has its own, and drawing them costs as many times more.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from jora.errors import InputError
from jora.kernels.counter_hash import fold_all
from jora.kernels.random_basis import VERSION, basis_keys, linear_combination, uniform
from jora.methods.lora import LoRA, check_rank, site_shape
from jora.methods.method import Adapter, Method, State
from jora.methods.targets import EMBED, HEAD
from jora.models.adapted import Bound, Rows
from jora.models.config import ModelConfig
from jora.sharding import Layout

if TYPE_CHECKING:
    from jora.methods.storage import AdapterFile
    from jora.models.safetensors_file import Entry

SIDES = {"a": 0, "b": 1}  # streams of a seed; another number would be another adapter
OFFSET = 2


@dataclass(frozen=True)
class NOLA(Method):
    """Options of a NOLA adapter.

    rank, alpha, dropout, layers_to_transform, exclude_modules: as LoRA's. targets: as LoRA's, without embed_tokens.
    bases: how many random matrices a factor is made of. basis: "shared" by all linears, or "unique" to each, which
    takes longer to draw. variant: "offset" adds a fixed random A0 (the authors' scripts), "pure" does not (the
    paper's equations). basis_seed: seed of the bases. bits: what a coefficient takes in files (see `nola_files`);
    training is in fp32. basis_version: of the hash, recorded in files; only the present one can be made.
    """

    rank: int = 16
    alpha: float = 4.0
    bases: int = 512
    targets: str | Sequence[str] = "all-linear"
    dropout: float = 0.0
    basis: Literal["shared", "unique"] = "shared"
    variant: Literal["offset", "pure"] = "offset"
    basis_seed: int = 0
    bits: Literal[32, 8, 4] = 32
    layers_to_transform: int | Sequence[int] | None = None
    exclude_modules: str | Sequence[str] = ()
    basis_version: int = VERSION

    name: ClassVar[str] = "nola"

    def __post_init__(self) -> None:
        lora = self.lora()  # checks what is LoRA's, and makes lists hashable
        for option in ("targets", "exclude_modules", "layers_to_transform"):
            object.__setattr__(self, option, getattr(lora, option))
        if self.bases < 1:
            raise InputError(f"NOLA: bases must be at least 1, found {self.bases}")
        if not 0 <= self.basis_seed < 2**32:
            raise InputError(f"NOLA: basis_seed must be at least 0 and below 2**32, found {self.basis_seed}")
        choices = {"basis": ("shared", "unique"), "variant": ("offset", "pure"), "bits": (32, 8, 4)}
        for option, allowed in choices.items():
            if getattr(self, option) not in allowed:
                known = ", ".join(map(str, allowed))
                raise InputError(f"NOLA: {option} must be one of {known}, found {getattr(self, option)!r}")

    def lora(self) -> LoRA:
        """The LoRA that an adapter of these options expands to."""
        return LoRA(
            rank=self.rank,
            alpha=self.alpha,
            targets=self.targets,
            dropout=self.dropout,
            layers_to_transform=self.layers_to_transform,
            exclude_modules=self.exclude_modules,
        )

    def sites(self, config: ModelConfig) -> dict[str, dict[int | None, tuple[int, float]]]:
        """As `LoRA.sites`. Raises InputError for embed_tokens, and where the rank is above a matrix's."""
        sites = self.lora().sites(config)
        if EMBED in sites:
            raise InputError(f"NOLA adapts linear layers; {EMBED} is a table: leave it out of targets")
        for target in sites:
            check_rank("nola", config, target, self.rank)
        return sites

    def check_version(self, where: str) -> None:
        """Raise InputError where the bases are of another hash than this version of Jora makes."""
        if self.basis_version != VERSION:
            raise InputError(
                f"{where}: its random bases are of version {self.basis_version} of the hash, this Jora makes version"
                f" {VERSION}; load it with the Jora that wrote it and save its to_lora there"
            )

    def init(self, model: Any, key: Array) -> Adapter:
        """b = 0; a = 0, or random in the pure variant. Step 0 computes what the base computes."""
        self.check_version("NOLA")
        state = _first(key, self, model.config, model.layout)
        return Adapter(self, state, model.config, dict(model.identity))

    def axes(self, config: ModelConfig) -> State:
        sites = self.sites(config)
        shapes = {t: site_shape(config, t) for t in sites}
        constant = {
            t: {"units": {"a": s.in_axes, "b": s.out_axes}, "layers": (None,), "scale": () if t == HEAD else (None,)}
            for t, s in shapes.items()
        }
        return State({t: dict.fromkeys("ab", (None, None)) for t in sites}, {"seed": (), "sites": constant})

    def bind(self, state: State, rows: Rows) -> Bound:
        return self.lora().bind(_lora_state(self, state), rows)

    def for_inference(self, adapter: Adapter) -> Adapter:
        """The factors that `bind` makes, as a LoRA on the devices; quicker than `to_lora`, whose sums are exact."""
        from jora.methods.nola_files import layout_of

        lora = self.lora()
        state = _factors(adapter.state, self, lora, adapter.config, layout_of(adapter))
        return Adapter(lora, state, adapter.config, adapter.base)

    def to_lora(self, adapter: Adapter) -> Adapter:
        """The expanded factors, summed on the host without any rounding before the last: the same bits everywhere."""
        from jora.methods.nola_files import expanded

        return expanded(adapter)

    def tensors(self, adapter: Adapter) -> list[Entry]:
        from jora.methods.nola_files import entries

        return super().tensors(adapter) if self.bits == 32 else entries(adapter)

    def restore(self, file: AdapterFile, model: Any) -> State:
        from jora.methods.nola_files import read

        self.check_version(str(file.path))
        return super().restore(file, model) if self.bits == 32 else read(self, file, model)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _first(key: Array, method: NOLA, config: ModelConfig, layout: Layout) -> State:
    """Coefficients, and the constants that say where the elements of each factor stand."""
    trained, constants = {}, {}
    for number, (target, by_layer) in enumerate(method.sites(config).items()):
        shape = site_shape(config, target)
        zeros = jnp.zeros((len(by_layer), method.bases), jnp.float32)
        drawn = jax.random.normal(jax.random.fold_in(key, number), zeros.shape) / math.sqrt(shape.in_size)
        trained[target] = {"a": zeros if method.variant == "offset" else drawn, "b": zeros}
        constants[target] = _constants(by_layer, config) | {
            "units": {"a": _count(shape.in_shape), "b": _count(shape.out_shape)}
        }
    state = State(trained, {"seed": jnp.uint32(method.basis_seed), "sites": constants})
    return jax.tree.map(lambda leaf, axes: layout.constrain(leaf, *axes), state, method.axes(config))


def _constants(by_layer: dict[int | None, tuple[int, float]], config: ModelConfig) -> dict[str, Array]:
    """Numbers of the adapted layers, and every layer's scale (0 where it is not adapted)."""
    if None in by_layer:
        return {"layers": jnp.zeros(1, jnp.int32), "scale": jnp.float32(by_layer[None][1])}
    scales = [by_layer.get(layer, (0, 0.0))[1] for layer in range(config.layers)]
    return {"layers": jnp.array(list(by_layer), jnp.int32), "scale": jnp.array(scales, jnp.float32)}


def _count(shape: tuple[int, ...]) -> Int[Array, "*u"]:
    return jnp.arange(math.prod(shape), dtype=jnp.int32).reshape(shape)


def target_number(target: str) -> np.uint32:
    """What stands for a target in a seed."""
    return np.uint32(zlib.crc32(target.encode()))


def side_keys(method: NOLA, seed: UInt32[Array, ""], side: str, target: str, layers: Int[Array, " n"]) -> Array:
    """Keys of a factor's bases: uint32 [k] where they are shared, [n, k] where each layer has its own."""
    if method.basis == "shared":
        return basis_keys(seed, method.bases, SIDES[side])
    return basis_keys(seed, method.bases, SIDES[side], target_number(target), layers)


def offset_keys(seed: UInt32[Array, ""], target: str, layers: Int[Array, " n"]) -> UInt32[Array, " n"]:
    """Keys of A0, one a layer."""
    return fold_all(seed, OFFSET, target_number(target), layers)


def _lora_state(method: NOLA, state: State) -> State:
    """The factors as the state of a LoRA."""
    sites = state.constant["sites"]
    factors = {side: _expand(method, state, side) for side in SIDES}
    pairs = {}
    for target, site in sites.items():
        a, b = (_stacked(factors[side][target], site) for side in SIDES)
        pairs[target] = {"a": jnp.moveaxis(a, site["scale"].ndim, -1), "b": b}
    return State(pairs, {target: site["scale"] for target, site in sites.items()})


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _factors(state: State, method: NOLA, lora: LoRA, config: ModelConfig, layout: Layout) -> State:
    return jax.tree.map(lambda leaf, axes: layout.constrain(leaf, *axes), _lora_state(method, state), lora.axes(config))


def _expand(method: NOLA, state: State, side: str) -> dict[str, Float[Array, "n r *u"]]:
    """One factor of every adapted linear, the columns before the units."""
    seed, sites = state.constant["seed"], state.constant["sites"]
    coefficients = {t: pair[side] / math.sqrt(method.bases) for t, pair in state.trained.items()}
    if method.basis == "shared":
        found = _expand_shared(method, seed, sites, coefficients, side)
    else:
        found = {t: _expand_unique(method, seed, sites[t], rows, side, t) for t, rows in coefficients.items()}
    if side == "a" and method.variant == "offset":
        return {t: factor + _offset(method, seed, sites[t], t) for t, factor in found.items()}
    return found


def _expand_shared(
    method: NOLA, seed: Array, sites: dict[str, Any], coefficients: dict[str, Array], side: str
) -> dict[str, Float[Array, "n r *u"]]:
    """Linears whose factors are of one shape and cut alike go together, all layers of all of them."""
    groups: dict[Any, list[str]] = {}
    for target in coefficients:
        groups.setdefault((sites[target]["units"][side].shape, _WIDTHS[side].get(target)), []).append(target)
    found: dict[str, Array] = {}
    for targets in groups.values():
        keys = basis_keys(seed, method.bases, SIDES[side])
        rows = jnp.concatenate([coefficients[t] for t in targets])
        factors = linear_combination(rows, keys, sites[targets[0]]["units"][side], method.rank)
        ends = np.cumsum([coefficients[t].shape[0] for t in targets])[:-1]
        found |= dict(zip(targets, jnp.split(jnp.moveaxis(factors, 0, 1), ends), strict=True))
    return found


# What a factor's units are, where that is not the model's width: such factors are cut differently on a mesh.
_WIDTHS = {
    "a": {"o_proj": "heads", "down_proj": "mlp"},
    "b": {"q_proj": "heads", "k_proj": "kv", "v_proj": "kv", "gate_proj": "mlp", "up_proj": "mlp", HEAD: "vocab"},
}


def _expand_unique(
    method: NOLA, seed: Array, site: dict[str, Any], rows: Float[Array, "n k"], side: str, target: str
) -> Float[Array, "n r *u"]:
    """A layer at a time, each with bases of its own."""
    keys = side_keys(method, seed, side, target, site["layers"])
    units = site["units"][side]
    return jax.lax.map(lambda one: linear_combination(one[0][None], one[1], units, method.rank)[:, 0], (rows, keys))


def _offset(method: NOLA, seed: Array, site: dict[str, Any], target: str) -> Float[Array, "n r *u"]:
    """A0, drawn again: as many numbers as the factor has."""
    units = site["units"]["a"].astype(jnp.uint32) * jnp.uint32(method.rank)
    columns = jnp.arange(method.rank, dtype=jnp.uint32).reshape(-1, *(1,) * units.ndim)
    bound = np.float32(1.0 / math.sqrt(units.size))
    return bound * uniform(offset_keys(seed, target, site["layers"]), units + columns)


def _stacked(factor: Float[Array, "n ..."], site: dict[str, Any]) -> Float[Array, "layers ..."]:
    """A row for every layer of the model, zero where it is not adapted; none outside the layers."""
    scale = site["scale"]
    if not scale.ndim:
        return factor[0]
    if factor.shape[0] == scale.shape[0]:
        return factor
    return jnp.zeros((*scale.shape, *factor.shape[1:]), factor.dtype).at[site["layers"]].set(factor)
