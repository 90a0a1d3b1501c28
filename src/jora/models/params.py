"""Parameters of the base model as plain pytrees, stacked the way the decoder scans them.

Shape legend: L layers; i.../o... input and output dimensions of a linear; v vocabulary
(padded up so that every mesh axis divides it), d model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jora.models.config import ModelConfig
from jora.models.tensors import TensorSpec, bias_specs, norm_specs, top_specs, weight_specs
from jora.quant import Kind, Pieces, QuantisedWeight, host_type
from jora.sharding import Layout


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Layers:
    """All layers, stacked: a scan hands the decoder one slice of every leaf."""

    norms: dict[str, Float[Array, "L w"]]
    weights: dict[str, Any]  # target -> [L, *in, *out], or a QuantisedWeight of such a stack
    biases: dict[str, Float[Array, "L ..."]]  # target -> [L, *out]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Params:
    """All weights."""

    embed: Float[Array, "v d"]
    layers: Layers
    final_norm: Float[Array, " d"]
    head: Float[Array, "v d"] | None  # None: tied to `embed`


def map_params(config: ModelConfig, top: Any, stack: Any) -> Params:
    """Build a Params by calling `top(spec, shape)` and `stack(specs, shape)` for each leaf.

    `specs` are the tensor specs of one stack, layer by layer; `shape` is the array's
    shape on the devices. Used for loading, for abstract shapes and for shardings, so they cannot differ.
    """

    def table(spec: TensorSpec) -> Any:
        return top(spec, (config.padded_vocab, *spec.shape[1:]) if spec.axes[0] == "vocab" else spec.shape)

    def leaves(family: Any) -> dict[str, Any]:
        per_layer = [family(config, number) for number in range(config.layers)]
        stacks = {key: [specs[key] for specs in per_layer] for key in per_layer[0]}
        return {key: stack(specs, (len(specs), *specs[0].shape)) for key, specs in stacks.items()}

    layers = Layers(leaves(norm_specs), leaves(weight_specs), leaves(bias_specs))
    specs = top_specs(config)
    head = table(specs["head"]) if "head" in specs else None
    return Params(table(specs["embed"]), layers, top(specs["final_norm"], (config.embed,)), head)


def pieces_of(spec: TensorSpec, layout: Layout) -> Pieces:
    """How a linear layer's weight lies on the devices."""
    return Pieces.of(layout, spec.shape, spec.axes, spec.outputs)


def abstract_stack(specs: list[TensorSpec], layout: Layout, quant: Kind) -> QuantisedWeight:
    """A stack of quantised weights, layer by layer in `specs`: shapes, dtypes and shardings."""
    return host_type(quant).weight.abstract(len(specs), specs[0].shape, pieces_of(specs[0], layout))


def abstract_params(config: ModelConfig, layout: Layout, dtype: Any = jnp.float32, quant: Kind | None = None) -> Params:
    """The parameters' shapes, dtypes and shardings without any memory, for planning and compiling."""

    def top(spec: TensorSpec, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(spec.axes, shape))

    def stack(specs: list[TensorSpec], shape: tuple[int, ...]) -> Any:
        if quant is not None and specs[0].outputs:
            return abstract_stack(specs, layout, quant)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding((None, *specs[0].axes), shape))

    return map_params(config, top, stack)


def random_params(config: ModelConfig, layout: Layout, dtype: Any = jnp.float32, seed: int = 0) -> Params:
    """Random weights of a sensible scale, for benchmarks and tests without a checkpoint."""
    shapes = abstract_params(config, layout, dtype)
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))

    def draw(key: Array, leaf: jax.ShapeDtypeStruct) -> Array:
        make = jax.jit(lambda k: 0.02 * jax.random.normal(k, leaf.shape, leaf.dtype), out_shardings=leaf.sharding)
        return make(key)

    return jax.tree.unflatten(structure, [draw(k, leaf) for k, leaf in zip(keys, leaves, strict=True)])
