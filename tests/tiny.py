"""Tiny random transformers models of every family: the oracle that parity tests compare with.

`tiny("gemma3")` gives a transformers model (fp32, eager attention, eval mode) and the directory it is saved in.
"""

from __future__ import annotations

import tempfile
from functools import cache
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

# On models this small a pool of threads only waits for itself: forty times slower on a busy machine.
torch.set_num_threads(1)

VOCAB = 99
_COMMON: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    tie_word_embeddings=False,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_LLAMA31_ROPE = dict(
    rope_type="llama3",
    rope_theta=10_000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
_GEMMA: dict[str, Any] = dict(head_dim=16, tie_word_embeddings=True)
_WINDOWED: dict[str, Any] = dict(**_GEMMA, sliding_window=7, query_pre_attn_scalar=20)

FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama2": (LlamaConfig, dict(num_key_value_heads=4)),
    "llama3": (LlamaConfig, dict(num_hidden_layers=3, rope_parameters=dict(rope_type="default", rope_theta=5e5))),
    "llama31": (LlamaConfig, dict(head_dim=16, tie_word_embeddings=True, rope_parameters=_LLAMA31_ROPE)),
    "mistral": (MistralConfig, dict(sliding_window=7, head_dim=16)),
    "qwen2": (Qwen2Config, {}),
    "qwen25": (Qwen2Config, dict(tie_word_embeddings=True, num_key_value_heads=1)),
    "qwen3": (Qwen3Config, dict(head_dim=16)),
    "gemma": (GemmaConfig, dict(**_GEMMA, num_key_value_heads=1)),
    "gemma2": (Gemma2Config, dict(**_WINDOWED, num_hidden_layers=4)),
    # Five sliding layers, a full one, and a remainder of two.
    "gemma3": (Gemma3TextConfig, dict(**_WINDOWED, num_hidden_layers=8)),
}

_DIRECTORIES: list[tempfile.TemporaryDirectory[str]] = []  # removed when the test process ends


def tiny(family: str, **overrides: Any) -> tuple[PreTrainedModel, str]:
    """A random model of `family` with config entries replaced, and its saved directory; made once a session.

    Do not change the model: take `copy.deepcopy` of it (as PEFT's wrappers need, which edit it in place).
    """
    return _make(family, repr(sorted(overrides.items())), _Unhashed(overrides))


class _Unhashed(dict[str, Any]):
    """Overrides that `lru_cache` leaves out of its key; their text is part of the key instead."""

    def __hash__(self) -> int:  # type: ignore[override]
        return 0

    def __eq__(self, other: object) -> bool:
        return True


@cache
def _make(family: str, key: str, overrides: _Unhashed) -> tuple[PreTrainedModel, str]:
    make_config, options = FAMILIES[family]
    config = make_config(**{**_COMMON, **options, **overrides})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    generator = torch.Generator().manual_seed(sum(map(ord, family)))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Norms and biases are vectors: around a half, so that neither ones nor zeros hide a mistake.
            parameter.copy_(0.2 * noise if parameter.ndim > 1 else 0.5 + 0.3 * noise)
    folder = tempfile.TemporaryDirectory(prefix=f"tiny-{family}-")
    _DIRECTORIES.append(folder)
    model.save_pretrained(folder.name)
    return model, folder.name


def tokens(batch: int = 2, length: int = 33, seed: int = 0) -> np.ndarray:
    """Random token ids, int32 [batch, length]."""
    return np.random.default_rng(seed).integers(0, VOCAB, (batch, length)).astype(np.int32)


def logits(model: Any, ids: np.ndarray) -> np.ndarray:
    """Logits of a transformers or PEFT model, float32 [batch, length, vocab]."""
    with torch.no_grad():
        return model(torch.from_numpy(np.asarray(ids, np.int64))).logits.float().numpy()


def assert_close(found: Any, expected: np.ndarray, tolerance: float = 1e-4) -> None:
    """Equal to `tolerance` times the spread (standard deviation) of what is expected."""
    difference = float(np.abs(np.asarray(found) - expected).max()) / float(expected.std())
    assert difference <= tolerance, f"differs by {difference:.2e} of the spread; {tolerance:.0e} is allowed"
