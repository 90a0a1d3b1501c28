"""The decoder: one scanned transformer that every supported family is a configuration of.

Shape legend: b rows, s tokens, d model width, k KV heads, g query heads per KV head, h head width.

What to notice:
- All layers run under one `lax.scan`, so compile time does not grow with depth. A layer's kind (window, rope)
  is data: a `switch` around attention alone runs the kernel of its kind.
- Every linear goes through `project`, the one place where a weight meets an adapter.
- Between blocks the residual stream is sharded over the sequence (`seq_sharded`).
- What the backward pass keeps is chosen by name (`SAVED`), never a copy of a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jora.kernels.attention import self_attention
from jora.kernels.spec import AttentionSpec
from jora.models.adapted import Bound, Dense, Rows, Site, project
from jora.models.cache import KV_AXES, Q_AXES, CachedLayer, KVCache
from jora.models.config import LayerKind, ModelConfig
from jora.models.params import Layers, Params
from jora.models.rope import Rotation, rotate, rotation
from jora.models.tensors import linear_shape
from jora.sharding import Layout

Remat = Literal["none", "selective", "full"]
C = TypeVar("C", bound=KVCache | None)

# "selective" keeps what feeds a matrix product's backward pass and recomputes only element-wise work and
# attention scores. "full" keeps a layer's input alone. "none" leaves the choice to JAX.
SAVED = ("q", "k", "v", "attention", "attention_out", "gate", "up", "mlp_out", "column_norm")


class Context(NamedTuple):
    """What every layer of one forward pass shares."""

    config: ModelConfig
    layout: Layout
    rotations: tuple[Rotation, ...]  # of each layer kind
    segments: Int[Array, "b s"] | None
    rows: Rows
    shared: Any = None  # what all layers' projections share (`Bound.shared`)


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
    cache: C = None,  # type: ignore[assignment]
    remat: Remat = "none",
) -> tuple[Float[Array, "b s d"], C]:
    """Hidden states after the final norm, and the cache with the new tokens written (not yet advanced).

    positions: for rotary embedding; None counts from 0, or takes the cache's. segments: 0 is padding, equal numbers
    see each other; None where each row is one sequence padded on the right. With a cache, rows attend to what the
    cache holds of them, and `segments` is not used.
    """
    if positions is None and cache is not None:
        positions = cache.positions(tokens.shape[1])
    first = None if cache is None else positions  # without a cache, a row's tokens are its first
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    context = context_of(config, layout, positions, segments, rows, bound.shared)
    x = _with_prefix(_embed(params, tokens, context, bound), bound, first)
    x = layout.constrain(x, "batch", "seq_sharded", None)
    x, cache = _scan_layers(x, params.layers, bound, cache, context, remat)
    return rms_norm(x, params.final_norm, config), cache


def context_of(
    config: ModelConfig,
    layout: Layout,
    positions: Int[Array, "b s"],
    segments: Int[Array, "b s"] | None,
    rows: Rows,
    shared: Any = None,
) -> Context:
    """What the layers of a forward pass share."""
    ropes = {"full": config.rope, "sliding": config.rope_sliding}
    rotations = tuple(rotation(ropes[kind], config.head_dim, positions) for kind in config.kinds)
    return Context(config, layout, rotations, segments, rows, shared)


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


def _with_prefix(
    vectors: Float[Array, "b s d"], bound: Bound, positions: Int[Array, "b s"] | None
) -> Float[Array, "b s d"]:
    """A soft prompt in place of the embeddings at the first positions; positions None: they count from 0."""
    if bound.prefix is None:
        return vectors
    slots = bound.prefix.shape[1]
    prefix = jnp.broadcast_to(bound.prefix.astype(vectors.dtype), (vectors.shape[0], slots, vectors.shape[2]))
    if positions is None:
        return jnp.concatenate([prefix, vectors[:, slots:]], axis=1)
    chosen = jnp.take_along_axis(prefix, positions[..., None], axis=1, mode="clip")
    used = slots if bound.prefix_slots is None else bound.prefix_slots
    return jnp.where((positions < used)[..., None], chosen, vectors)


def _scan_layers(x: Array, layers: Layers, bound: Bound, cache: C, context: Context, remat: Remat) -> tuple[Array, C]:
    """Run all layers. The cache travels in the carry: as xs -> ys it would exist twice."""
    config = context.config
    block = _remat(partial(_block, context=context), remat)

    def step(carry: tuple[Array, C], xs: Any) -> tuple[tuple[Array, C], None]:
        x, cache = carry
        return block(x, *xs, cache), None

    (x, cache), _ = jax.lax.scan(step, (x, cache), (layers, bound.layers, *layer_numbers(config)))
    return x, cache


def layer_numbers(config: ModelConfig) -> tuple[Int[Array, " L"], Int[Array, " L"]]:
    """(number, kind) of every layer."""
    kinds = [config.kinds.index(kind) for kind in config.layer_kinds]
    return jnp.arange(config.layers, dtype=jnp.int32), jnp.array(kinds, jnp.int32)


def _remat(block: Any, remat: Remat) -> Any:
    if remat == "none":
        return block
    policies = jax.checkpoint_policies
    policy = policies.save_only_these_names(*SAVED) if remat == "selective" else policies.nothing_saveable
    return jax.checkpoint(block, policy=policy, prevent_cse=False)


def _block(
    x: Float[Array, "b s d"],
    layer: Layers,
    adapters: Mapping[str, Any],
    number: Int[Array, ""],
    kind: Int[Array, ""],
    cache: C,
    *,
    context: Context,
) -> tuple[Float[Array, "b s d"], C]:
    """One transformer layer: attention and MLP, each with its norms and residual."""
    config, constrain = context.config, context.layout.constrain

    def linear(target: str, x: Array) -> Array:
        dense = dense_of(layer, target, context)
        y = project(x, dense, adapters.get(target), Site(target, number, context.shared, adapters), context.rows)
        if target in _TO_RESIDUAL:
            # Backward, both the weight and the adapter need the whole sequence: gather it once for both.
            y = context.layout.constrain_gradient(y, "batch", None, None)
            return constrain(y, "batch", "seq_sharded", None)
        return constrain(y, "batch", None, *dense.out_axes)

    def norm(name: str, x: Array) -> Array:
        return rms_norm(x, layer.norms[name], config) if name in layer.norms else x

    # A block works on whole sequences: gather the residual's sequence shards once, after the norm.
    h = constrain(norm("input", x), "batch", None, None)
    attended, cache = _attention(h, linear, layer, number, kind, cache, context)
    x = x + norm("post_attention", checkpoint_name(linear("o_proj", attended), "attention_out"))
    h = constrain(norm("mlp", x), "batch", None, None)
    gate = checkpoint_name(linear("gate_proj", h), "gate")
    up = checkpoint_name(linear("up_proj", h), "up")
    out = checkpoint_name(linear("down_proj", _activate(gate, config) * up), "mlp_out")
    return constrain(x + norm("post_mlp", out), "batch", "seq_sharded", None), cache


_TO_RESIDUAL = ("o_proj", "down_proj")


def _attention(
    h: Array,
    linear: Callable[[str, Array], Array],
    layer: Layers,
    number: Array,
    kind: Array,
    cache: C,
    context: Context,
) -> tuple[Array, C]:
    """Projections, norms of q and k, rotation and attention: [b, s, d] -> [b, s, k, g, h]."""
    config, layout = context.config, context.layout
    q, k, v = (checkpoint_name(linear(f"{name}_proj", h), name) for name in "qkv")
    turn = _of_kind(kind, context.rotations)
    norms = (layer.norms.get("q"), layer.norms.get("k"))

    def prepare(x: Array, cos: Array, sin: Array, weight: Array | None) -> Array:
        x = x if weight is None else rms_norm(x, weight, config)
        return rotate(x, Rotation(cos, sin))

    def attend(q: Array, k: Array, v: Array, cos: Array, sin: Array, q_norm: Any, k_norm: Any, *rest: Any) -> Array:
        return attend_prepared(prepare(q, cos, sin, q_norm), prepare(k, cos, sin, k_norm), v, *rest)

    def attend_prepared(q: Array, k: Array, v: Array, kind: Array, segments: Any) -> Array:
        kernels = [partial(self_attention, segments=segments, spec=_spec(config, each)) for each in config.kinds]
        return jax.lax.switch(kind, kernels, q, k, v) if len(kernels) > 1 else kernels[0](q, k, v)

    if cache is None:
        arrays = (q, k, v, turn.cos, turn.sin, *norms, kind, context.segments)
        axes = (Q_AXES, KV_AXES, KV_AXES, _ANGLES, _ANGLES, (None,), (None,), (), ("batch", None))
        out = layout.local(attend, arrays, axes, Q_AXES)
    else:
        q, k = prepare(q, turn.cos, turn.sin, norms[0]), prepare(k, turn.cos, turn.sin, norms[1])
        windows = tuple(jnp.int32(_spec(config, each).window or NO_WINDOW) for each in config.kinds)

        def among(q: Array, k: Array, v: Array) -> Array:
            return layout.local(attend_prepared, (q, k, v, kind, None), (Q_AXES, KV_AXES, KV_AXES, (), None), Q_AXES)

        here = CachedLayer(number, _of_kind(kind, windows), _spec(config, "full"), among)
        out, cache = cache.attend(q, k, v, here)
    return checkpoint_name(out, "attention"), cache


NO_WINDOW = np.iinfo(np.int32).max


def _spec(config: ModelConfig, kind: LayerKind) -> AttentionSpec:
    window = config.window if kind == "sliding" else None
    return AttentionSpec(scale=config.attention_scale, window=window, cap=config.attention_cap)


def _of_kind(kind: Array, values: Sequence[Any]) -> Any:
    """The value of a layer's kind, where kinds are data."""
    return values[0] if len(values) == 1 else jax.tree.map(lambda *leaves: jax.lax.select_n(kind, *leaves), *values)


_ANGLES = ("batch", None, None)


def _activate(x: Array, config: ModelConfig) -> Array:
    if config.activation == "silu":
        return jax.nn.silu(x)
    return jax.nn.gelu(x, approximate=config.activation == "gelu_tanh")


def dense_of(layer: Layers, target: str, context: Context) -> Dense:
    """The frozen projection of one site inside the scan."""
    shape = linear_shape(context.config, target)
    return Dense(
        layer.weights[target],
        layer.biases.get(target),
        shape.in_axes,
        shape.out_axes,
        context.layout,
    )
