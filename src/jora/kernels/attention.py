"""Which attention runs where: cuDNN's flash kernel on a GPU where it can, blocked XLA everywhere else."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jora.kernels import paged_decode
from jora.kernels.attention_xla import blocked_attention
from jora.kernels.spec import AttentionSpec

CUDNN_HEAD_DIM = 128  # cuDNN takes 256 on Hopper and later; this is what every supported GPU takes
HOPPER_HEAD_DIM = 256


def self_attention(
    q: Float[Array, "b s k g h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    segments: Int[Array, "b s"] | None,
    spec: AttentionSpec,
) -> Float[Array, "b s k g h"]:
    """Causal self-attention of whole sequences. Query heads are grouped under their KV head.

    `segments` (None: one sequence a row, padded on the right) keeps packed examples apart.
    """
    if why_not_cudnn(q.dtype, q.shape[-1], spec, segments is not None) is None:
        return _cudnn(q, k, v, spec)
    return blocked_attention(q, k, v, segments, spec)


def why_not_cudnn(dtype: Any, head_dim: int, spec: AttentionSpec, packed: bool) -> str | None:
    """The reason why cuDNN's kernel cannot run here, or None where it does."""
    if jax.default_backend() != "gpu":
        return f"the device is a {jax.default_backend()}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN takes 16-bit floats only, not {jnp.dtype(dtype).name}"
    if spec.cap is not None:
        return "cuDNN has no soft cap"
    if packed:
        return "packed rows need segment masks, which the public cuDNN call takes only as a dense bias"
    if head_dim % 8 or head_dim > _largest_cudnn_head():
        return f"cuDNN takes head widths that are multiples of 8 up to {_largest_cudnn_head()}, not {head_dim}"
    return None


def _largest_cudnn_head() -> int:
    capability = getattr(jax.devices()[0], "compute_capability", "0")
    return HOPPER_HEAD_DIM if float(capability) >= 9.0 else CUDNN_HEAD_DIM


def _cudnn(q: Array, k: Array, v: Array, spec: AttentionSpec) -> Array:
    length = q.shape[1]
    if length % 2:  # jax refuses the gradient of an odd length; one more token at the end is seen by nobody
        q, k, v = (jnp.pad(x, ((0, 0), (0, 1), *((0, 0),) * (x.ndim - 2))) for x in (q, k, v))
    heads = q.reshape(*q.shape[:2], -1, q.shape[-1])
    window = None if spec.window is None else (spec.window - 1, 0)
    out = jax.nn.dot_product_attention(
        heads,
        k,
        v,
        scale=spec.scale,
        is_causal=True,
        local_window_size=window,
        implementation="cudnn",
    )
    return out.reshape(q.shape)[:, :length]


def explain() -> list[str]:
    """For `jora env`: which attention runs for which kind of layer on this machine, and why."""
    cases = {
        "full, bf16, head 128": (jnp.bfloat16, 128, AttentionSpec(1.0), False),
        "full, bf16, head 256": (jnp.bfloat16, 256, AttentionSpec(1.0), False),
        "window, bf16, head 128": (jnp.bfloat16, 128, AttentionSpec(1.0, window=512), False),
        "soft cap (Gemma 2), bf16": (jnp.bfloat16, 128, AttentionSpec(1.0, cap=50.0), False),
        "packed rows, bf16": (jnp.bfloat16, 128, AttentionSpec(1.0), True),
        "full, fp32": (jnp.float32, 128, AttentionSpec(1.0), False),
    }
    lines = []
    for name, (dtype, head_dim, spec, packed) in cases.items():
        reason = why_not_cudnn(dtype, head_dim, spec, packed)
        lines.append(f"attention, {name}: " + (f"blocked XLA ({reason})" if reason else "cuDNN flash attention"))
    reason = paged_decode.why_not(jnp.bfloat16, 1, (1, 128))
    lines.append("attention, decoding from pages, bf16: " + (f"blocked XLA ({reason})" if reason else "Triton kernel"))
    return lines
