"""The GPU's decode kernel in Pallas' interpreter, against dense attention in numpy; `tests/gpu` runs it for real."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.kernels.test_paged_attention import FULL, SLOT, Filled

from jora.kernels import paged_decode as kernel
from jora.kernels.paged_decode import decode_pages, why_not
from jora.kernels.spec import AttentionSpec


@partial(jax.jit, static_argnums=(5, 6))
def attend(q, pool, pages, positions, window, page_tokens: int, spec: AttentionSpec):
    slot = jnp.int32(SLOT)
    return decode_pages(q, pool, pages, slot, page_tokens, positions, window, spec, interpret=True)


@pytest.mark.parametrize(("page_tokens", "cap"), [(1, None), (5, 2.0), (16, None)])
@pytest.mark.parametrize("parts", [1, 3])
def test_equals_dense_attention(monkeypatch, page_tokens: int, cap: float | None, parts: int) -> None:
    """Rows of very different lengths, one of them empty; what no row wrote is NaN; several reads and parts of a row."""
    monkeypatch.setattr(kernel, "TOKENS", 16)
    monkeypatch.setattr(kernel, "PARTS", parts)
    attend.clear_cache()
    filled = Filled([83, 1, 20, 1, 64, 17], page_tokens)
    positions = np.array([82, 0, 19, -1, 63, 16], np.int32)[:, None]
    q, spec = filled.queries(positions), AttentionSpec(0.6, cap=cap)
    for window in (FULL, 1, 7, 40):
        arrays = (q, filled.pool, filled.pages, positions, np.int32(window))
        found = np.asarray(attend(*arrays, page_tokens, spec))
        np.testing.assert_allclose(found, filled.expected(q, positions, window, spec), atol=2e-6)
        assert not found[3].any()


def test_where_it_runs(monkeypatch) -> None:
    assert why_not(jnp.bfloat16, 1, (1, 128)) == f"the device is a {jax.default_backend()}"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert why_not(jnp.bfloat16, 1, (1, 128)) is None
    assert "16-bit" in (why_not(jnp.float32, 1, (1, 128)) or "")
    assert "one new token" in (why_not(jnp.bfloat16, 2, (1, 128)) or "")
    assert "not 96" in (why_not(jnp.bfloat16, 1, (1, 96)) or "")
    assert "not 24" in (why_not(jnp.bfloat16, 1, (24, 128)) or "")
