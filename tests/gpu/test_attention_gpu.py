"""Attention on a GPU: cuDNN's kernel against the blocked one in fp32, and what does not go to cuDNN against the CPU."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.gpu.devices import cpu
from tests.kernels.test_attention import packed

from jora.kernels.attention import explain, self_attention
from jora.kernels.attention_xla import blocked_attention
from jora.kernels.spec import AttentionSpec

pytestmark = pytest.mark.gpu

HALF = 1e-2  # of the norm: 16-bit inputs and outputs, fp32 sums
FORWARD, BACKWARD = "Softmax", "SoftmaxBackward"  # of cuDNN's fused attention, as XLA calls them


def drawn(length: int, kv: int, group: int, width: int, dtype: Any) -> list[jax.Array]:
    """q, k, v and the gradient of the output, of two rows, on the GPU."""
    rng = np.random.default_rng(length)
    queries, keys = (2, length, kv, group, width), (2, length, kv, width)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in (queries, keys, keys, queries)]


def on_host(arrays: list[jax.Array]) -> list[jax.Array]:
    """In fp32 on the CPU: the GPU's compiler takes minutes over such products at full precision."""
    return [jax.device_put(x.astype(jnp.float32), cpu()) for x in arrays]


def with_gradients(attention: Callable[..., jax.Array]) -> Callable[..., list[jax.Array]]:
    """(q, k, v, dL/dout) to the output and the gradients of q, k and v."""

    def run(q: jax.Array, k: jax.Array, v: jax.Array, gradient: jax.Array) -> list[jax.Array]:
        out, pull = jax.vjp(attention, q, k, v)
        return [out, *pull(gradient)]

    return run


def compiled(function: Callable[..., Any], *arrays: jax.Array) -> tuple[Any, set[str]]:
    """The executable, and which of cuDNN's fused attentions it calls."""
    program = jax.jit(function).lower(*arrays).compile()
    return program, set(re.findall(r"__cudnn\$fmha(\w+)", program.as_text() or ""))


def assert_near(found: list[jax.Array], expected: list[jax.Array], tolerance: float) -> None:
    """Output and gradients, by the norm of each."""
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        reference = np.asarray(theirs, np.float64)
        error = np.linalg.norm(np.asarray(ours, np.float64) - reference) / np.linalg.norm(reference)
        assert error < tolerance, f"{('out', 'dq', 'dk', 'dv')[number]} differs by {error:.1e} of its norm"


# length, KV heads, query heads a KV head, head width, window
CUDNN = {
    "grouped queries, head 128": (256, 2, 4, 128, None),
    "head 256, one KV head, window": (1000, 1, 4, 256, 512),
    "odd length": (129, 2, 2, 128, None),
}


@pytest.mark.parametrize("case", CUDNN)
def test_cudnn_equals_blocked_attention_in_fp32(case: str) -> None:
    length, kv, group, width, window = CUDNN[case]
    spec = AttentionSpec(scale=width**-0.5, window=window)
    arrays = drawn(length, kv, group, width, jnp.bfloat16)
    program, calls = compiled(with_gradients(lambda q, k, v: self_attention(q, k, v, None, spec)), *arrays)
    assert calls == {FORWARD, BACKWARD} or length % 2  # backward, jax refuses cuDNN odd lengths
    reference = jax.jit(with_gradients(lambda q, k, v: blocked_attention(q, k, v, None, spec)))
    assert_near(program(*arrays), reference(*on_host(arrays)), HALF)


@pytest.mark.parametrize("length", [1, 34])
def test_cudnn_forward_alone(length: int) -> None:
    """As in evaluation and prefill; heads as narrow as the tiny models'."""
    spec = AttentionSpec(scale=0.3, window=7)
    q, k, v, _ = drawn(length, 2, 2, 8, jnp.bfloat16)
    program, calls = compiled(lambda q, k, v: self_attention(q, k, v, None, spec), q, k, v)
    assert calls == {FORWARD} or length % 2
    wide = on_host([q, k, v])
    assert_near([program(q, k, v)], [blocked_attention(wide[0], wide[1], wide[2], None, spec)], HALF)


# dtype, head width, packed, soft cap
XLA = {
    "packed rows": (jnp.bfloat16, 64, True, None),
    "soft cap": (jnp.bfloat16, 64, False, 2.0),
    "fp32": (jnp.float32, 64, False, None),
    "a head of 12": (jnp.bfloat16, 12, False, None),
}


@pytest.mark.parametrize("case", XLA)
def test_what_cudnn_does_not_take_agrees_with_the_cpu(case: str) -> None:
    dtype, width, is_packed, cap = XLA[case]
    length = 300  # two blocks of queries
    spec = AttentionSpec(scale=width**-0.5, window=100, cap=cap)
    segments: Any = packed(np.random.default_rng(0), 2, length) if is_packed else None
    arrays = drawn(length, 2, 2, width, dtype)
    program, calls = compiled(with_gradients(lambda q, k, v: self_attention(q, k, v, segments, spec)), *arrays)
    assert not calls
    reference = jax.jit(with_gradients(lambda q, k, v: blocked_attention(q, k, v, segments, spec)))
    expected = reference(*on_host(arrays))
    assert_near(program(*arrays), expected, HALF if dtype == jnp.bfloat16 else 1e-5)


def test_what_is_explained_is_what_runs() -> None:
    runs = {line.split(": ")[0].removeprefix("attention, "): line.split(": ")[1] for line in explain()}
    assert runs["full, bf16, head 128"] == runs["window, bf16, head 128"] == "cuDNN flash attention"
    assert all(runs[name].startswith("blocked XLA") for name in ("packed rows, bf16", "full, fp32"))
    assert runs["decoding from pages, bf16"] == "Triton kernel"
