"""fLoRA (arXiv 2312.05677): a weight changed element by element, so that each row may have an adapter of its own.

W' = W * sum_j in_j out_j^T (element-wise product), hence y = sum_j out_j * ((in_j * x) W) + bias. The paper names
the mean over j; this is the sum, whose factors `out` are r times smaller.

First values: in_1 = out_1 = 1, the base itself; for the others out_j = 0 and in_j is random. (With all of them 1
every component would get the same gradient for ever, and the rank would stay 1.) The vectors are fp32: around 1 a
bfloat16 has steps of 2^-7.

What the adapter does to the base is of full rank, so there is no LoRA that equals it; merging is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jora.errors import InputError
from jora.kernels.hadamard import hadamard_product
from jora.methods.layer_sites import layer_masks, layer_sites
from jora.methods.lora import check_rank, site_shape
from jora.methods.method import Adapter, Method, ModuleSite, RowsMerger, State
from jora.methods.targets import checked_choice
from jora.models.adapted import Bound, Dense, Rows, Site
from jora.models.config import ModelConfig

if TYPE_CHECKING:
    from jora.methods.served import Served

INPUT_SPREAD = 0.1  # of the first in_j, j > 1: small beside the 1 of the first component


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FLoRAProjection:
    """The vectors of one site; leaves gain a layer axis outside scans.

    With `Rows.jobs` each leaf has a leading axis of jobs, and a row takes the vectors of its own job.
    """

    inputs: Float[Array, "r *in"]
    outputs: Float[Array, "r *out"]
    adapted: Bool[Array, ""]

    def apply(self, x: Array, dense: Dense, site: Site, rows: Rows) -> Array:
        identity = (jnp.arange(self._rank(rows)) == 0).astype(jnp.float32)
        inputs, outputs = (self._of_rows(v, identity, rows) for v in (self.inputs, self.outputs))
        whole = tuple(None if axis == "embed" else axis for axis in dense.in_axes + dense.out_axes)
        own = dense.inputs

        def product(x: Array, weight: Array, inputs: Array, outputs: Array) -> Array:
            return hadamard_product(x, weight, inputs, outputs, whole[:own], whole[own:], dense.layout)

        y = dense.with_weight(product, x, inputs, outputs)
        return y if dense.bias is None else y + dense.bias

    def _rank(self, rows: Rows) -> int:
        return self.inputs.shape[0 if rows.jobs is None else 1]

    def _of_rows(self, vectors: Array, identity: Array, rows: Rows) -> Float[Array, "n r *features"]:
        """The vectors of each row, or [1, r, ...] for all; where a layer is not adapted, those of the base."""
        chosen = vectors[None] if rows.jobs is None else vectors[rows.jobs]
        adapted = self.adapted[None] if rows.jobs is None else self.adapted[rows.jobs]
        wide = (1,) * (chosen.ndim - 2)
        return jnp.where(adapted.reshape(-1, 1, *wide), chosen, identity.reshape(1, -1, *wide))


@dataclass(frozen=True)
class FLoRA(Method):
    """Options of an fLoRA adapter.

    rank: components; each costs one more product by the base's weight. targets, exclude_modules,
    layers_to_transform: as for `LoRA`, linears of the layers only. A learning rate some 40 times LoRA's suits it:
    the paper trains at 8e-3 (code) and 6e-3 (speech).
    """

    rank: int = 1
    targets: str | Sequence[str] = ("k_proj", "q_proj")
    exclude_modules: str | Sequence[str] = ()
    layers_to_transform: int | Sequence[int] | None = None

    name: ClassVar[str] = "flora"

    def __post_init__(self) -> None:
        for option in ("targets", "exclude_modules", "layers_to_transform"):
            value = checked_choice(option, getattr(self, option))
            object.__setattr__(self, option, tuple(sorted(value)) if isinstance(value, tuple) else value)
        if self.rank < 1:
            raise InputError(f"flora: rank must be at least 1, found {self.rank}")

    def masks(self, config: ModelConfig) -> dict[str, Bool[np.ndarray, " layers"]]:
        """{target: which of its layers are adapted}. Raises InputError for a rank above a matrix's smaller side."""
        sites = layer_sites("flora", config, self.targets, self.exclude_modules, self.layers_to_transform)
        for target, _ in sites.values():
            check_rank("flora", config, target, self.rank)
        return layer_masks(config, sites.values())

    def init(self, model: Any, key: Array) -> Adapter:
        """The base itself (see the module)."""
        config, layout = model.config, model.layout
        masks = self.masks(config)
        state = State(
            {t: self._first(k, config, t) for k, t in zip(jax.random.split(key, len(masks)), masks, strict=True)},
            {target: jnp.asarray(mask) for target, mask in masks.items()},
        )
        state = jax.tree.map(lambda x, a: jax.device_put(x, layout.sharding(a, x.shape)), state, self.axes(config))
        return Adapter(self, state, config, dict(model.identity))

    def _first(self, key: Array, config: ModelConfig, target: str) -> dict[str, Array]:
        shape = site_shape(config, target)
        inputs = INPUT_SPREAD * jax.random.normal(key, (config.layers, self.rank, *shape.in_shape), jnp.float32)
        outputs = jnp.zeros((config.layers, self.rank, *shape.out_shape), jnp.float32)
        return {"inputs": inputs.at[:, 0].set(1.0), "outputs": outputs.at[:, 0].set(1.0)}

    def axes(self, config: ModelConfig) -> State:
        trained = {}
        for target in self.masks(config):
            shape = site_shape(config, target)
            trained[target] = {"inputs": (None, None, *shape.in_axes), "outputs": (None, None, *shape.out_axes)}
        return State(trained, {target: (None,) for target in trained})

    def bind(self, state: State, rows: Rows) -> Bound:
        return Bound({t: FLoRAProjection(**v, adapted=state.constant[t]) for t, v in state.trained.items()})

    def mergers(self, adapter: Adapter) -> Mapping[ModuleSite, RowsMerger]:
        """Each element of the weight times that of sum_j in_j out_j^T; the bias stays."""
        found: dict[ModuleSite, RowsMerger] = {}
        for target, mask in self.masks(adapter.config).items():
            for layer in np.flatnonzero(mask).tolist():
                found[target, layer] = partial(_scaled_rows, adapter, target, layer)
        return found

    def lower(self, adapter: Adapter, model: Any) -> Served:
        """The vectors themselves; in a layer that is not adapted those of the base."""
        from jora.methods.served import Products, Served, finite

        trained, adapted = adapter.state

        def of_layers(target: str, vectors: Array) -> np.ndarray:
            host, mask = np.array(vectors, np.float32), np.asarray(adapted[target])
            host[~mask] = 0
            host[~mask, 0] = 1
            return finite(self.name, target, host)

        return Served(
            products={t: Products(of_layers(t, v["inputs"]), of_layers(t, v["outputs"])) for t, v in trained.items()}
        )


def _scaled_rows(adapter: Adapter, target: str, layer: int, block: np.ndarray, rows: slice) -> np.ndarray:
    vectors = adapter.state.trained[target]
    rank = adapter.method.rank
    inputs, outputs = (np.asarray(vectors[side][layer]).reshape(rank, -1) for side in ("inputs", "outputs"))
    scaled: np.ndarray = block * (outputs[:, rows].T @ inputs)
    return scaled


def together(adapters: Sequence[Adapter]) -> Adapter:
    """Adapters of one model as one, for batches whose rows say by `Rows.jobs` which of them is theirs.

    Ranks may differ: smaller ones are filled up with components of 0. All must adapt the same targets; the layers
    may differ. Leaves are [layers, jobs, ...]. Raises InputError for targets that differ.
    """
    states = [adapter.state for adapter in adapters]
    targets = states[0].constant.keys()
    if any(state.constant.keys() != targets for state in states):
        raise InputError(f"flora: adapters of one batch must have the same targets, found {[*map(_targets, states)]}")
    method = max((adapter.method for adapter in adapters), key=lambda method: method.rank)

    def filled(*leaves: Array) -> Array:
        return jnp.stack([_up_to(leaf, method.rank) for leaf in leaves], axis=1)

    trained = jax.tree.map(filled, *(state.trained for state in states))
    constant = jax.tree.map(lambda *masks: jnp.stack(masks, axis=1), *(state.constant for state in states))
    return Adapter(method, State(trained, constant), adapters[0].config, adapters[0].base)


def _targets(state: State) -> list[str]:
    return sorted(state.constant)


def _up_to(leaf: Array, rank: int) -> Array:
    return jnp.pad(leaf, ((0, 0), (0, rank - leaf.shape[1]), *((0, 0),) * (leaf.ndim - 2)))
