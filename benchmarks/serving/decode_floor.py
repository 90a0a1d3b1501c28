"""The least that one decode step has to move and to compute, from shapes alone.

With b rows of c tokens of context, W entries of all linears in the layers, V words of width d, k distinct adapters of
A entries each, e bytes an entry, and for each layer the t <= c tokens that its mask leaves:

    bytes = e (W + V d + k A + b sum_layers(2 t kv_heads head_dim))
    FLOPs = 2 b (W + V d) + 2 b A [k > 0] + 4 b sum_layers(t heads head_dim)

The weights, each distinct adapter and the cache are read once; a row multiplies by its own adapter alone. Norms,
activations, the token's embedding, sampling and the host count as free. A step takes at least
max(bytes / bandwidth, FLOPs / rate); the floor of k adapters against the base is the ratio of two such numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Step(NamedTuple):
    """What one decode step moves and computes."""

    bytes: int
    flops: int

    def seconds(self, bandwidth: float, rate: float) -> float:
        """At so many bytes and FLOPs a second."""
        return max(self.bytes / bandwidth, self.flops / rate)


def linears(config: Any) -> dict[str, tuple[int, int]]:
    """(in, out) of the seven linears of a layer; `config` is a ModelConfig or looks like one."""
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    attention = {"q_proj": (config.embed, query), "k_proj": (config.embed, key), "v_proj": (config.embed, key)}
    up, down = (config.embed, config.mlp), (config.mlp, config.embed)
    return {**attention, "o_proj": (query, config.embed), "gate_proj": up, "up_proj": up, "down_proj": down}


def adapter_entries(config: Any, rank: int) -> int:
    """Numbers of one LoRA adapter of this rank on all linears."""
    return config.layers * rank * sum(i + o for i, o in linears(config).values())


def step(config: Any, rows: int, context: int, rank: int, distinct: int, entry_bytes: int = 4) -> Step:
    """One decode step of `rows` sequences that have `context` tokens each, `distinct` adapters among them."""
    weights = config.layers * sum(i * o for i, o in linears(config).values()) + config.vocab_size * config.embed
    adapter = adapter_entries(config, rank)
    windows = [config.window if kind == "sliding" else context for kind in config.layer_kinds]
    seen = sum(min(window, context) for window in windows)
    cache = rows * 2 * seen * config.kv_heads * config.head_dim
    attention = 4 * rows * seen * config.heads * config.head_dim
    products = 2 * rows * (weights + (adapter if distinct else 0))
    return Step(entry_bytes * (weights + distinct * adapter + cache), products + attention)


FORMULA = "max((W + Vd + kA + KV) e / bandwidth, (2b(W + Vd) + 2bA[k>0] + attention) / rate), over the same with k = 0"
