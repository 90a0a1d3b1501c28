"""LoRA factors between the devices' padded stacks and PEFT's tensors of true rank, one site at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from jora.methods.lora import LoRA, site_shape
from jora.methods.method import Adapter, State
from jora.methods.targets import EMBED, HEAD
from jora.models.config import ModelConfig
from jora.models.tensors import layer_prefix, module_path
from jora.sharding import Layout


class FactorSite(NamedTuple):
    """One adapted module: its true rank and scale, and its tensors' names and shapes in a PEFT file."""

    target: str
    layer: int | None
    rank: int
    scale: float
    names: tuple[str, str]
    shapes: tuple[tuple[int, int], tuple[int, int]]  # A [rank, in], B [out, rank]


class Factors(NamedTuple):
    """A and B of one module in PEFT's layout, fp32 on the host."""

    a: Float[np.ndarray, "r i"]
    b: Float[np.ndarray, "o r"]


def factor_sites(method: LoRA, config: ModelConfig) -> list[FactorSite]:
    """Every adapted module, layer by layer."""
    found = []
    for target, by_layer in method.sites(config).items():
        shape = site_shape(config, target)
        # Files know no padding of the vocabulary.
        into = config.vocab_size if target == EMBED else shape.in_size
        out = config.vocab_size if target == HEAD else shape.out_size
        for layer, (rank, scale) in by_layer.items():
            names = _names(target, layer)
            found.append(FactorSite(target, layer, rank, scale, names, ((rank, into), (out, rank))))
    return sorted(found, key=lambda site: (-1 if site.layer is None else site.layer, site.target))


def _names(target: str, layer: int | None) -> tuple[str, str]:
    if target == EMBED:
        # PEFT keeps these as bare parameters, hence no ".weight".
        prefix = "base_model.model.model.embed_tokens"
        return f"{prefix}.lora_embedding_A", f"{prefix}.lora_embedding_B"
    module = HEAD if layer is None else layer_prefix(layer) + module_path(target)
    return f"base_model.model.{module}.lora_A.weight", f"base_model.model.{module}.lora_B.weight"


def host_factors(adapter: Adapter, site: FactorSite) -> Factors:
    """The factors of one site, gathered from the devices, padding cut off."""
    pair = adapter.state.trained[site.target]
    a, b = (np.asarray(pair[f] if site.layer is None else _layer(pair[f], site.layer)) for f in "ab")
    (_, into), (out, _) = site.shapes
    largest = a.shape[-1]
    return Factors(
        a.reshape(-1, largest)[:into, : site.rank].T,
        b.reshape(largest, -1)[: site.rank, :out].T,
    )


@jax.jit
def _layer(stack: Array, layer: int) -> Array:
    return jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)


def delta(factors: Factors, site: FactorSite, rows: slice) -> Float[np.ndarray, "n c"]:
    """What the adapter adds to rows of the module's Hugging Face weight, fp32."""
    if site.target == EMBED:
        return (factors.a.T[rows] * np.float32(site.scale)) @ factors.b.T
    return (factors.b[rows] * np.float32(site.scale)) @ factors.a


def device_state(method: LoRA, config: ModelConfig, layout: Layout, read: Callable[[FactorSite], Factors]) -> State:
    """The method's state on the devices from `read`, one target's stack in host memory at a time."""
    axes = method.axes(config)
    sites: dict[str, list[FactorSite]] = {}
    for site in factor_sites(method, config):
        sites.setdefault(site.target, []).append(site)
    trained, constant = {}, {}
    for target, chosen in sites.items():
        pair, scale = _stacks(config, target, chosen, read)
        trained[target] = {f: _place(layout, axes.trained[target][f], pair[f]) for f in "ab"}
        constant[target] = _place(layout, axes.constant[target], scale)
    return State(trained, constant)


def _stacks(
    config: ModelConfig, target: str, sites: list[FactorSite], read: Callable[[FactorSite], Factors]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Zero-padded a [layers?, *in, r] and b [layers?, r, *out], and the scales."""
    shape = site_shape(config, target)
    largest = max(site.rank for site in sites)
    stack = () if target in (EMBED, HEAD) else (config.layers,)
    a = np.zeros((*stack, shape.in_size, largest), np.float32)
    b = np.zeros((*stack, largest, shape.out_size), np.float32)
    scale = np.zeros(stack, np.float32)
    for site in sites:
        where = () if site.layer is None else (site.layer,)
        (_, into), (out, _) = site.shapes
        factors = read(site)
        a[(*where, slice(into), slice(site.rank))] = factors.a.T
        b[(*where, slice(site.rank), slice(out))] = factors.b.T
        scale[where] = site.scale
    pair = {"a": a.reshape(*stack, *shape.in_shape, largest), "b": b.reshape(*stack, largest, *shape.out_shape)}
    return pair, scale


def _place(layout: Layout, axes: tuple[Any, ...], value: np.ndarray) -> Array:
    return jax.make_array_from_callback(value.shape, layout.sharding(axes, value.shape), partial(_part, value))


def _part(value: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
    return np.asarray(value[index], np.float32)
