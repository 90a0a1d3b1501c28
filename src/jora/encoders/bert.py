"""BERT and RoBERTa in JAX: weights from safetensors, and hidden states as transformers computes them.

Shape legend: b texts, s tokens, d width, n heads, h head width, L layers.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jora.encoders.config import EncoderConfig
from jora.errors import InputError
from jora.models.source import TensorSource

MASKED = -1e30
# Old checkpoints call a norm's weight and bias as TensorFlow did.
_OLD_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
_LINEARS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_out": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
_NORMS = {"attention_norm": "attention.output.LayerNorm", "norm": "output.LayerNorm"}


class Affine(NamedTuple):
    """A linear layer ([in, out]) or a norm ([d]) with its bias; within layers [L, ...]."""

    weight: Float[Array, "..."]
    bias: Float[Array, "..."]


class EncoderParams(NamedTuple):
    """All weights, fp32."""

    words: Float[Array, "v d"]
    positions: Float[Array, "p d"]
    kind: Float[Array, " d"]  # of token type 0: one text alone has no other
    norm: Affine
    layers: dict[str, Affine]


def load_params(source: TensorSource, config: EncoderConfig, where: str) -> EncoderParams:
    """The weights, saved alone or under a task's head ("bert.", "roberta."). Raises InputError for a missing tensor."""
    suffix = "embeddings.word_embeddings.weight"
    names = source.names()
    prefix = next((name.removesuffix(suffix) for name in sorted(names) if name.endswith(suffix)), "")

    def read(name: str) -> np.ndarray:
        old = name
        for new, before in _OLD_NAMES.items():
            old = old.replace(new, before)
        found = next((n for n in (prefix + name, prefix + old) if n in names), None)
        if found is None:
            raise InputError(f"{where}: lacks the tensor {name} of a BERT or RoBERTa encoder")
        return source.read(found, tuple(slice(0, n) for n in source.shape(found))).astype(np.float32)

    def affine(name: str) -> tuple[np.ndarray, np.ndarray]:
        return read(f"{name}.weight").T, read(f"{name}.bias")

    def stack(name: str) -> Affine:
        layers = [affine(f"encoder.layer.{number}.{name}") for number in range(config.layers)]
        return Affine(*(jnp.asarray(np.stack(parts)) for parts in zip(*layers, strict=True)))

    return EncoderParams(
        jnp.asarray(read(suffix)),
        jnp.asarray(read("embeddings.position_embeddings.weight")),
        jnp.asarray(read("embeddings.token_type_embeddings.weight")[0]),
        Affine(*map(jnp.asarray, affine("embeddings.LayerNorm"))),
        {key: stack(name) for key, name in {**_LINEARS, **_NORMS}.items()},
    )


@partial(jax.jit, static_argnames="config")
def hidden_states(
    params: EncoderParams, tokens: Int[Array, "b s"], mask: Bool[Array, "b s"], *, config: EncoderConfig
) -> Float[Array, "b s d"]:
    """The last layer's hidden states, fp32; `mask` is False on padding, which stands on the right."""
    places = config.first_position + jnp.arange(tokens.shape[1])
    x = params.words[tokens] + params.positions[places] + params.kind
    x = _norm(x, params.norm, config)

    def layer(x: Array, weights: dict[str, Affine]) -> tuple[Array, None]:
        attended = _linear(_attention(x, weights, mask, config), weights["attention_out"])
        x = _norm(x + attended, weights["attention_norm"], config)
        inner = _activate(_linear(x, weights["up"]), config)
        return _norm(x + _linear(inner, weights["down"]), weights["norm"], config), None

    return jax.lax.scan(layer, x, params.layers)[0]


def _linear(x: Array, weights: Affine) -> Array:
    return x @ weights.weight + weights.bias


def _norm(x: Float[Array, "b s d"], weights: Affine, config: EncoderConfig) -> Float[Array, "b s d"]:
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + config.norm_eps) * weights.weight + weights.bias


def _attention(x: Array, weights: dict[str, Affine], mask: Array, config: EncoderConfig) -> Float[Array, "b s d"]:
    def heads(name: str) -> Float[Array, "b s n h"]:
        return _linear(x, weights[name]).reshape(*x.shape[:2], config.heads, -1)

    q, k, v = heads("query"), heads("key"), heads("value")
    scores = jnp.einsum("bsnh,btnh->bnst", q, k) / np.sqrt(q.shape[-1]).astype(np.float32)
    shares = jax.nn.softmax(jnp.where(mask[:, None, None], scores, MASKED), axis=-1)
    return jnp.einsum("bnst,btnh->bsnh", shares, v).reshape(x.shape)


def _activate(x: Array, config: EncoderConfig) -> Array:
    activations: dict[str, Any] = {
        "gelu": partial(jax.nn.gelu, approximate=False),
        "gelu_new": partial(jax.nn.gelu, approximate=True),
        "relu": jax.nn.relu,
    }
    return activations[config.activation](x)
