"""The decoder: one scanned transformer that every supported family is a configuration of.

Shape legend: b rows, s tokens, d model width, k KV heads, g query heads per KV head, h head width.

What to notice:
- Layers run under `lax.scan` over the family's repeating unit, so compile time does not grow with depth.
- Every linear goes through `project`, the one place where a weight meets an adapter.
- Between blocks the residual stream is sharded over the sequence (`seq_sharded`).
- What the backward pass keeps is chosen by name (`SAVED`), never a copy of a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jora.kernels.attention import cached_attention, self_attention
from jora.kernels.spec import AttentionSpec
from jora.models.adapted import Bound, Dense, Rows, Site, project
from jora.models.cache import KV, Cache, write
from jora.models.config import LayerKind, ModelConfig, Segment, plan_layers
from jora.models.params import Layer, Params
from jora.models.rope import Rotation, rotate, rotation
from jora.models.tensors import linear_shape
from jora.sharding import Layout

Remat = Literal["none", "selective", "full"]

# "selective" keeps what feeds a matrix product's backward pass and recomputes only element-wise work and
# attention scores. "full" keeps a layer's input alone. "none" leaves the choice to JAX.
SAVED = ("q", "k", "v", "attention", "attention_out", "gate", "up", "mlp_out")


class Context(NamedTuple):
    """What every layer of one forward pass shares."""

    config: ModelConfig
    layout: Layout
    rotations: Mapping[LayerKind, Rotation]
    segments: Int[Array, "b s"] | None
    rows: Rows
    indices: Int[Array, "b s"] | None  # slots of the new tokens in the cache; None: no cache, or an empty one


def forward(
    params: Params,
    config: ModelConfig,
    layout: Layout,
    tokens: Int[Array, "b s"],
    positions: Int[Array, "b s"] | None = None,
    segments: Int[Array, "b s"] | None = None,
    *,
    bound: Bound,
    rows: Rows,
    cache: Cache | None = None,
    fresh: bool = False,
    remat: Remat = "none",
) -> tuple[Float[Array, "b s d"], Cache | None]:
    """Hidden states after the final norm, and the cache with the new tokens written (not yet advanced).

    positions: for rotary embedding; None counts from 0, or from the cache's lengths. segments: 0 is padding,
    equal numbers see each other; None where each row is one sequence padded on the right. With a cache,
    rows attend to their own slots, and `segments` is not used. fresh: the cache is empty (prefill), so the
    tokens attend to one another by the blocked kernel instead of to all slots.
    """
    indices = None if cache is None or fresh else cache.indices(tokens.shape[1])
    if positions is None:
        counted = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        positions = jnp.broadcast_to(counted if indices is None else indices, tokens.shape)
    rotations: dict[LayerKind, Rotation] = {
        "full": rotation(config.rope, config.head_dim, positions),
        "sliding": rotation(config.rope_sliding, config.head_dim, positions),
    }
    context = Context(config, layout, rotations, segments, rows, indices)
    x = layout.constrain(_embed(params, tokens, context, bound), "batch", "seq_sharded", None)
    caches: list[Any] = []
    for number, segment in enumerate(plan_layers(config.layer_kinds)):
        kvs = None if cache is None else cache.segments[number]
        x, kvs = _scan_segment(x, segment, params.segments[number], bound, kvs, context, remat)
        caches.append(kvs)
    x = rms_norm(x, params.final_norm, config)
    return x, None if cache is None else Cache(tuple(caches), cache.lengths)


def rms_norm(x: Float[Array, "*b w"], weight: Float[Array, " w"], config: ModelConfig) -> Float[Array, "*b w"]:
    """RMSNorm (arXiv 1910.07467) with fp32 statistics; Gemma multiplies by 1 + weight before it rounds."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + config.norm_eps)
    if config.norm_offset:
        return (wide * (1.0 + weight.astype(jnp.float32))).astype(x.dtype)
    return weight * wide.astype(x.dtype)


def _embed(params: Params, tokens: Array, context: Context, bound: Bound) -> Array:
    vectors = params.embed.at[tokens].get(mode="clip")
    if bound.embed is not None:
        vectors = bound.embed.embed(tokens, vectors)
    # transformers rounds the scale to the weights' dtype before it multiplies
    return vectors * jnp.asarray(context.config.embed_scale, vectors.dtype)


def _scan_segment(
    x: Array,
    segment: Segment,
    layers: tuple[Layer, ...],
    bound: Bound,
    kvs: tuple[KV, ...] | None,
    context: Context,
    remat: Remat,
) -> tuple[Array, tuple[KV, ...] | None]:
    """Run the layers of one scan. The cache travels in the carry: as xs -> ys it would exist twice."""
    adapters = [_adapters_of(bound, segment, position) for position in range(len(segment.unit))]
    blocks = [_remat(partial(_block, kind=kind, context=context), remat) for kind in segment.unit]

    def step(carry: tuple[Array, Any], xs: Any) -> tuple[tuple[Array, Any], None]:
        x, kvs = carry
        repeat, unit, unit_adapters = xs
        updated = []
        for position, block in enumerate(blocks):
            number = segment.start + repeat * len(blocks) + position
            kv = None if kvs is None else kvs[position]
            x, kv = block(x, unit[position], unit_adapters[position], number, repeat, kv)
            updated.append(kv)
        return (x, None if kvs is None else tuple(updated)), None

    repeats = jnp.arange(segment.repeats, dtype=jnp.int32)
    (x, kvs), _ = jax.lax.scan(step, (x, kvs), (repeats, layers, adapters))
    return x, kvs


def _adapters_of(bound: Bound, segment: Segment, position: int) -> dict[str, Any]:
    """The projections of one unit position, stacked over the scan's repeats."""
    step = len(segment.unit)
    first, last = segment.start + position, segment.start + segment.layers
    return {target: jax.tree.map(lambda leaf: leaf[first:last:step], p) for target, p in bound.layers.items()}


def _remat(block: Any, remat: Remat) -> Any:
    if remat == "none":
        return block
    policies = jax.checkpoint_policies
    policy = policies.save_only_these_names(*SAVED) if remat == "selective" else policies.nothing_saveable
    return jax.checkpoint(block, policy=policy, prevent_cse=False)


def _block(
    x: Float[Array, "b s d"],
    layer: Layer,
    adapters: Mapping[str, Any],
    number: Int[Array, ""],
    repeat: Int[Array, ""],
    kv: KV | None,
    *,
    kind: LayerKind,
    context: Context,
) -> tuple[Float[Array, "b s d"], KV | None]:
    """One transformer layer: attention and MLP, each with its norms and residual."""
    config, constrain = context.config, context.layout.constrain

    def linear(target: str, x: Array) -> Array:
        dense = dense_of(layer, target, context)
        y = project(x, dense, adapters.get(target), Site(target, number), context.rows)
        if target in _TO_RESIDUAL:
            # Backward, both the weight and the adapter need the whole sequence: gather it once for both.
            y = context.layout.constrain_gradient(y, "batch", None, None)
            return constrain(y, "batch", "seq_sharded", None)
        return constrain(y, "batch", None, *dense.out_axes)

    def norm(name: str, x: Array) -> Array:
        return rms_norm(x, layer.norms[name], config) if name in layer.norms else x

    # A block works on whole sequences: gather the residual's sequence shards once, after the norm.
    h = constrain(norm("input", x), "batch", None, None)
    attended, kv = _attention(h, linear, layer, kind, repeat, kv, context)
    x = x + norm("post_attention", checkpoint_name(linear("o_proj", attended), "attention_out"))
    h = constrain(norm("mlp", x), "batch", None, None)
    gate = checkpoint_name(linear("gate_proj", h), "gate")
    up = checkpoint_name(linear("up_proj", h), "up")
    out = checkpoint_name(linear("down_proj", _activate(gate, config) * up), "mlp_out")
    return constrain(x + norm("post_mlp", out), "batch", "seq_sharded", None), kv


_TO_RESIDUAL = ("o_proj", "down_proj")


def _attention(
    h: Array,
    linear: Callable[[str, Array], Array],
    layer: Layer,
    kind: LayerKind,
    repeat: Array,
    kv: KV | None,
    context: Context,
) -> tuple[Array, KV | None]:
    """Projections, norms of q and k, rotation and attention: [b, s, d] -> [b, s, k, g, h]."""
    config, layout = context.config, context.layout
    q, k, v = (checkpoint_name(linear(f"{name}_proj", h), name) for name in "qkv")
    spec = AttentionSpec(
        scale=config.attention_scale,
        window=config.window if kind == "sliding" else None,
        cap=config.attention_cap,
    )
    turn = context.rotations[kind]

    def prepare(x: Array, cos: Array, sin: Array, weight: Array | None) -> Array:
        x = x if weight is None else rms_norm(x, weight, config)
        return rotate(x, Rotation(cos, sin))

    def attend(q: Array, k: Array, v: Array, cos: Array, sin: Array, q_norm: Any, k_norm: Any, segments: Any) -> Array:
        return self_attention(prepare(q, cos, sin, q_norm), prepare(k, cos, sin, k_norm), v, segments, spec)

    norms = (layer.norms.get("q"), layer.norms.get("k"))
    if kv is None:
        arrays = (q, k, v, turn.cos, turn.sin, *norms, context.segments)
        axes = (_Q, _KV, _KV, _ANGLES, _ANGLES, (None,), (None,), ("batch", None))
        out = layout.local(attend, arrays, axes, _Q)
    else:
        q, k = prepare(q, *turn, norms[0]), prepare(k, *turn, norms[1])
        kv = write(kv, repeat, context.indices, k, v)
        if context.indices is None:  # prefill: nothing but these tokens is in the cache
            out = layout.local(lambda q, k, v: self_attention(q, k, v, None, spec), (q, k, v), (_Q, _KV, _KV), _Q)
        else:
            out = cached_attention(q, kv.k[repeat], kv.v[repeat], context.indices, spec)
    return checkpoint_name(out, "attention"), kv


# Logical axes of activations around attention: heads are independent, so all of it is local to a device.
_Q = ("batch", None, "kv_heads", "q_group", None)
_KV = ("batch", None, "kv_heads", None)
_ANGLES = ("batch", None, None)


def _activate(x: Array, config: ModelConfig) -> Array:
    if config.activation == "silu":
        return jax.nn.silu(x)
    return jax.nn.gelu(x, approximate=config.activation == "gelu_tanh")


def dense_of(layer: Layer, target: str, context: Context) -> Dense:
    """The frozen projection of one site inside the scan."""
    shape = linear_shape(context.config, target)
    return Dense(
        layer.weights[target],
        layer.biases.get(target),
        shape.in_axes,
        shape.out_axes,
        context.layout,
    )
