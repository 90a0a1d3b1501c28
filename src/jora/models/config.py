"""What a decoder is made of: one frozen description that drives every family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LayerKind = Literal["full", "sliding"]

# The linear layers of a decoder layer, under the names that Hugging Face and PEFT give them.
ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_LINEARS = ("gate_proj", "up_proj", "down_proj")
LINEARS = ATTENTION_LINEARS + MLP_LINEARS

VOCAB_MULTIPLE = 64


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of one layer kind.

    kind "default", "linear" (positions divided by `factor`) or "llama3" (Llama 3.1: low frequencies
    divided by `factor`, with a smooth passage between; `low`, `high` and `original` are its settings).
    """

    theta: float
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer of the Llama / Mistral / Qwen / Gemma kind.

    Lengths are counts of elements; `layer_kinds` has one entry a layer. Query heads come in `kv_heads`
    groups of `heads // kv_heads`, in Hugging Face's order.
    """

    family: str
    vocab_size: int
    embed: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    layer_kinds: tuple[LayerKind, ...]
    rope: Rope  # of full-attention layers
    rope_sliding: Rope  # of sliding-window layers
    window: int | None = None
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    norm_eps: float = 1e-6
    norm_offset: bool = False  # Gemma: the norm multiplies by 1 + weight
    sandwich_norms: bool = False  # Gemma 2 and 3: norms after attention and MLP too
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    attention_scale: float = 1.0
    attention_cap: float | None = None
    logit_cap: float | None = None
    embed_scale: float = 1.0
    tied_embeddings: bool = False
    max_positions: int = 2048

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The layer kinds that occur, each once; the scan's kind numbers index it."""
        return tuple(dict.fromkeys(self.layer_kinds))

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

    @property
    def padded_vocab(self) -> int:
        """Rows of the vocabulary's tables on the devices: padded, so that a mesh can cut an odd vocabulary."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def norms(self) -> tuple[str, ...]:
        """Names of a layer's norms (see `models/tensors.py` for the tensors behind them)."""
        names = ["input", "mlp"]
        if self.sandwich_norms:
            names += ["post_attention", "post_mlp"]
        if self.qk_norm:
            names += ["q", "k"]
        return tuple(names)
