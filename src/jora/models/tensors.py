"""The table of a model's tensors: Hugging Face's name and shape beside Jora's shape and logical axes.

Loading, saving, abstract parameters and parameter counts all read this one table.

A linear layer is stored as [*in, *out] with its heads kept apart (q_proj: [embed, kv, group, head_dim]),
so that a sharding can name them; Hugging Face stores the same numbers as [out, in].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from jora.models.config import LINEARS, ModelConfig

Axes = tuple[str | None, ...]


@dataclass(frozen=True)
class LinearShape:
    """Sizes and logical axes of one linear layer's input and output."""

    in_shape: tuple[int, ...]
    in_axes: Axes
    out_shape: tuple[int, ...]
    out_axes: Axes
    bias: bool = False

    @property
    def in_size(self) -> int:
        return math.prod(self.in_shape)

    @property
    def out_size(self) -> int:
        return math.prod(self.out_shape)


def linear_shape(config: ModelConfig, target: str) -> LinearShape:
    """The shape of a layer's linear `target` ("q_proj" ... "down_proj")."""
    c = config
    embed, mlp = ((c.embed,), ("embed",)), ((c.mlp,), ("mlp",))
    queries = ((c.kv_heads, c.group, c.head_dim), ("kv_heads", "q_group", None))
    keys = ((c.kv_heads, c.head_dim), ("kv_heads", None))
    ends = {
        "q_proj": (embed, queries),
        "k_proj": (embed, keys),
        "v_proj": (embed, keys),
        "o_proj": (queries, embed),
        "gate_proj": (embed, mlp),
        "up_proj": (embed, mlp),
        "down_proj": (mlp, embed),
    }
    (in_shape, in_axes), (out_shape, out_axes) = ends[target]
    bias = c.o_bias if target == "o_proj" else c.qkv_bias and target in ("q_proj", "k_proj", "v_proj")
    return LinearShape(in_shape, in_axes, out_shape, out_axes, bias)


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the checkpoint.

    `shape` = [*in, *out] is Jora's; `outputs` says how many trailing dimensions are output dimensions of a
    linear layer (Hugging Face: [prod(out), prod(in)]). `outputs` = 0: stored alike on both sides, except
    that Hugging Face flattens a bias.
    """

    name: str
    shape: tuple[int, ...]
    axes: Axes
    outputs: int = 0

    @property
    def hf_shape(self) -> tuple[int, ...]:
        if self.outputs:
            cut = len(self.shape) - self.outputs
            return math.prod(self.shape[cut:]), math.prod(self.shape[:cut])
        return (math.prod(self.shape),) if self.name.endswith(".bias") else self.shape


def layer_prefix(layer: int) -> str:
    return f"model.layers.{layer}."


def module_path(target: str) -> str:
    """Where a linear sits inside a layer, in Hugging Face's names: "self_attn.q_proj", "mlp.up_proj"."""
    return ("mlp." if target in ("gate_proj", "up_proj", "down_proj") else "self_attn.") + target


# Jora's norm name -> Hugging Face's, which differs where Gemma 2 and 3 put norms after a block too.
_NORMS = {"input": "input_layernorm", "mlp": "post_attention_layernorm"}
_SANDWICH_NORMS = {
    "input": "input_layernorm",
    "post_attention": "post_attention_layernorm",
    "mlp": "pre_feedforward_layernorm",
    "post_mlp": "post_feedforward_layernorm",
}
_QK_NORMS = {"q": "self_attn.q_norm", "k": "self_attn.k_norm"}


def norm_specs(config: ModelConfig, layer: int) -> dict[str, TensorSpec]:
    names = {**(_SANDWICH_NORMS if config.sandwich_norms else _NORMS), **_QK_NORMS}
    specs = {}
    for norm in config.norms():
        width = config.head_dim if norm in _QK_NORMS else config.embed
        specs[norm] = TensorSpec(f"{layer_prefix(layer)}{names[norm]}.weight", (width,), (None,))
    return specs


def weight_specs(config: ModelConfig, layer: int) -> dict[str, TensorSpec]:
    specs = {}
    for target in LINEARS:
        s = linear_shape(config, target)
        name = f"{layer_prefix(layer)}{module_path(target)}.weight"
        specs[target] = TensorSpec(name, s.in_shape + s.out_shape, s.in_axes + s.out_axes, len(s.out_shape))
    return specs


def bias_specs(config: ModelConfig, layer: int) -> dict[str, TensorSpec]:
    specs = {}
    for target in LINEARS:
        s = linear_shape(config, target)
        if s.bias:
            # A bias is added to an activation, whose embed axis is whole: only its heads are cut.
            axes = tuple(None if a == "embed" else a for a in s.out_axes)
            specs[target] = TensorSpec(f"{layer_prefix(layer)}{module_path(target)}.bias", s.out_shape, axes)
    return specs


def top_specs(config: ModelConfig) -> dict[str, TensorSpec]:
    """The tensors outside the layers: "embed", "final_norm" and, where it is not tied, "head"."""
    table = (config.vocab_size, config.embed)
    specs = {
        "embed": TensorSpec("model.embed_tokens.weight", table, ("vocab", None)),
        "final_norm": TensorSpec("model.norm.weight", (config.embed,), (None,)),
    }
    if not config.tied_embeddings:
        specs["head"] = TensorSpec("lm_head.weight", table, ("vocab", None))
    return specs


def all_specs(config: ModelConfig) -> Iterator[TensorSpec]:
    """Every tensor of the checkpoint."""
    yield from top_specs(config).values()
    for layer in range(config.layers):
        for specs in (norm_specs(config, layer), weight_specs(config, layer), bias_specs(config, layer)):
            yield from specs.values()


def parameter_count(config: ModelConfig) -> int:
    """Number of base parameters; a tied head counts once."""
    return sum(math.prod(spec.shape) for spec in all_specs(config))
