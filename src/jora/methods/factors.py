"""LoRA factors between the devices' padded stacks and PEFT's tensors of true rank, one site at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from jora.methods.extras.both import extra_mergers
from jora.methods.lora import LoRA, site_shape, true_sizes
from jora.methods.method import Adapter, ModuleSite, RowsMerger, State
from jora.methods.storage import place
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
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]  # A [rank, in], B [out, rank], and DoRA's magnitude [out]


class Factors(NamedTuple):
    """A and B of one module in PEFT's layout, fp32 on the host, and DoRA's magnitude."""

    a: Float[np.ndarray, "r i"]
    b: Float[np.ndarray, "o r"]
    magnitude: Float[np.ndarray, " o"] | None = None


def factor_sites(method: LoRA, config: ModelConfig) -> list[FactorSite]:
    """Every adapted module, layer by layer."""
    found = []
    for target, by_layer in method.sites(config).items():
        into, out = true_sizes(config, target)
        for layer, (rank, scale) in by_layer.items():
            names = _names(target, layer)
            shapes: tuple[tuple[int, ...], ...] = ((rank, into), (out, rank))
            if method.magnitudes:
                names, shapes = (*names, names[0].replace("lora_A.weight", "lora_magnitude_vector")), (*shapes, (out,))
            found.append(FactorSite(target, layer, rank, scale, names, shapes))
    return sorted(found, key=lambda site: (-1 if site.layer is None else site.layer, site.target))


def _names(target: str, layer: int | None) -> tuple[str, ...]:
    if target == EMBED:
        # PEFT keeps these as bare parameters, hence no ".weight".
        prefix = "base_model.model.model.embed_tokens"
        return f"{prefix}.lora_embedding_A", f"{prefix}.lora_embedding_B"
    module = HEAD if layer is None else layer_prefix(layer) + module_path(target)
    return f"base_model.model.{module}.lora_A.weight", f"base_model.model.{module}.lora_B.weight"


def host_factors(adapter: Adapter, site: FactorSite) -> Factors:
    """The factors of one site, gathered from the devices, padding cut off."""
    own = {
        name: np.asarray(factor if site.layer is None else _layer(factor, site.layer))
        for name, factor in adapter.state.trained[site.target].items()
    }
    (_, into), (out, *_) = site.shapes[:2]
    largest = own["a"].shape[-1]
    return Factors(
        own["a"].reshape(-1, largest)[:into, : site.rank].T,
        own["b"].reshape(largest, -1)[: site.rank, :out].T,
        own["magnitude"].reshape(-1)[:out] if "magnitude" in own else None,
    )


@jax.jit
def _layer(stack: Array, layer: int) -> Array:
    return jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)


def delta(factors: Factors, site: FactorSite, rows: slice) -> Float[np.ndarray, "n c"]:
    """What the adapter adds to rows of the module's Hugging Face weight, fp32."""
    if site.target == EMBED:
        return (factors.a.T[rows] * np.float32(site.scale)) @ factors.b.T
    return (factors.b[rows] * np.float32(site.scale)) @ factors.a


def lora_mergers(adapter: Adapter) -> dict[ModuleSite, RowsMerger]:
    """W + s A B, for each adapted module; its factors come to the host with the first rows that are asked for.

    With magnitudes m (DoRA) each row is scaled to its m; a row of zeros stays one.
    """
    sites = factor_sites(adapter.method, adapter.config)
    return {(site.target, site.layer): _merger(adapter, site) for site in sites} | extra_mergers(adapter)


def _merger(adapter: Adapter, site: FactorSite) -> RowsMerger:
    fetched: list[Factors] = []

    def merge(block: np.ndarray, rows: slice) -> np.ndarray:
        if not fetched:
            fetched.append(host_factors(adapter, site))
        merged = delta(fetched[0], site, rows) + block
        magnitude = fetched[0].magnitude
        if magnitude is None:
            return merged
        norms = np.linalg.norm(merged, axis=1)
        return merged * np.divide(magnitude[rows], norms, out=np.ones_like(norms), where=norms > 0)[:, None]

    return merge


def device_state(method: LoRA, config: ModelConfig, layout: Layout, read: Callable[[FactorSite], Factors]) -> State:
    """The method's state on the devices from `read`, one target's stack in host memory at a time."""
    axes = method.axes(config)
    sites: dict[str, list[FactorSite]] = {}
    for site in factor_sites(method, config):
        sites.setdefault(site.target, []).append(site)
    trained, constant = {}, {}
    for target, chosen in sites.items():
        stacks, scale = _stacks(config, target, chosen, read)
        trained[target] = {f: place(layout, axes.trained[target][f], stack) for f, stack in stacks.items()}
        constant[target] = place(layout, axes.constant[target], scale)
    return State(trained, constant)


def _stacks(
    config: ModelConfig, target: str, sites: list[FactorSite], read: Callable[[FactorSite], Factors]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Zero-padded a [layers?, *in, r], b [layers?, r, *out] and magnitude [layers?, *out], and the scales."""
    shape = site_shape(config, target)
    largest = max(site.rank for site in sites)
    stack = () if target in (EMBED, HEAD) else (config.layers,)
    a = np.zeros((*stack, shape.in_size, largest), np.float32)
    b = np.zeros((*stack, largest, shape.out_size), np.float32)
    magnitude = np.zeros((*stack, shape.out_size), np.float32)
    scale = np.zeros(stack, np.float32)
    for site in sites:
        where = () if site.layer is None else (site.layer,)
        (_, into), (out, *_) = site.shapes[:2]
        factors = read(site)
        a[(*where, slice(into), slice(site.rank))] = factors.a.T
        b[(*where, slice(site.rank), slice(out))] = factors.b.T
        if factors.magnitude is not None:
            magnitude[(*where, slice(out))] = factors.magnitude
        scale[where] = site.scale
    stacks = {"a": a.reshape(*stack, *shape.in_shape, largest), "b": b.reshape(*stack, largest, *shape.out_shape)}
    if len(sites[0].names) == 3:
        stacks["magnitude"] = magnitude.reshape(*stack, *shape.out_shape)
    return stacks, scale
