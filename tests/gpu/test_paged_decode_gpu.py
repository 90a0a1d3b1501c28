"""The decode kernel compiled by Triton, against the XLA code on the same GPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jora.kernels import paged_decode
from jora.kernels.paged_attention import Table, paged_attention
from jora.kernels.spec import AttentionSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]

FULL = np.iinfo(np.int32).max
CASES = {  # KV heads, query heads of each, width, tokens of a page, context, window, cap
    "Llama 2": (4, 1, 128, 16, 300, FULL, None),
    "grouped": (2, 4, 128, 16, 1000, FULL, None),
    "Gemma 2": (1, 4, 256, 16, 700, 512, 50.0),
    "odd pages": (2, 2, 64, 5, 130, FULL, None),
}


@pytest.mark.parametrize("case", list(CASES))
def test_equals_xla(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    kv_heads, group, width, page_tokens, context, window, cap = CASES[case]
    rows, slot = 4, jnp.int32(1)
    blocks = -(-context // page_tokens)
    draw = np.random.default_rng(0)
    pages = draw.permutation(np.arange(1, rows * blocks + 1)).reshape(rows, blocks).astype(np.int32)
    pool = jax.random.normal(jax.random.key(0), (pages.size + 1, 1, 4 * page_tokens * kv_heads * width), jnp.bfloat16)
    q = jax.random.normal(jax.random.key(1), (rows, 1, kv_heads, group, width), jnp.bfloat16)
    positions = np.array([-1, 0, context // 2, context - 1], np.int32)[:, None]
    spec = AttentionSpec(width**-0.5, cap=cap)

    def attend(q: jax.Array, pool: jax.Array, pages: jax.Array, positions: jax.Array) -> jax.Array:
        return paged_attention(q, pool, Table(pages, slot, page_tokens), positions, jnp.int32(window), spec)

    compiled = jax.jit(attend).lower(q, pool, pages, positions).compile()
    assert "paged_decode" in compiled.as_text()
    found = np.asarray(compiled(q, pool, pages, positions), np.float32)
    monkeypatch.setattr(paged_decode, "why_not", lambda *_: "it is what the kernel is compared with")
    expected = np.asarray(jax.jit(lambda *a: attend(*a))(q, pool, pages, positions), np.float32)
    assert not found[0].any()
    assert np.linalg.norm(found - expected) < 1e-2 * np.linalg.norm(expected)
