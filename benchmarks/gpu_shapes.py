"""What the GPU scripts share about Llama 2 7B: its config, random weights of it, and the least a LoRA step takes."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace
from typing import Any

import floor
import numpy as np

SIZES = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
RATE_SIDE, RATE_CALLS, RATE_REPEATS = 8192, 20, 5


def llama(tiny: bool) -> dict[str, Any]:
    """The config.json of Llama 2 7B, or of a tiny Llama that tries the scripts."""
    sizes = TINY if tiny else SIZES
    fixed = {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10_000.0}
    heads = {"num_key_value_heads": sizes["num_attention_heads"], "tie_word_embeddings": False}
    return {**fixed, **sizes, **heads, "vocab_size": 512 if tiny else 32_000, "max_position_embeddings": 4096}


def row(length: int, vocabulary: int) -> np.ndarray:
    """The one row that every contestant trains on."""
    return np.random.default_rng(0).integers(3, vocabulary, length).astype(np.int32)


def lora_flops(hf: dict[str, Any], tokens: int, answers: int, rank: int) -> dict[str, int]:
    """FLOPs that a LoRA step cannot avoid (`floor.step_flops`), from a config.json of a Llama and without jax.

    Frozen linears: 2 N forward and 2 N for the gradient of their inputs, a token. Nothing is computed again.
    """
    heads, layers = hf["num_attention_heads"], hf["num_hidden_layers"]
    config = SimpleNamespace(
        layers=layers,
        embed=hf["hidden_size"],
        mlp=hf["intermediate_size"],
        heads=heads,
        kv_heads=hf["num_key_value_heads"],
        head_dim=hf["hidden_size"] // heads,
        vocab_size=hf["vocab_size"],
        layer_kinds=("full",) * layers,
        window=None,
    )
    return floor.step_flops(config, tokens, answers, rank)


def matmul_rate(side: int = RATE_SIDE) -> float:
    """FLOPs a second of square bf16 products of random matrices in jax (fp32 on a CPU), the best of a few timings."""
    import jax
    import jax.numpy as jnp

    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    x, y = (jax.random.normal(jax.random.key(n), (side, side), dtype) for n in range(2))
    multiply = jax.jit(jnp.matmul)
    multiply(x, y).block_until_ready()
    timings = []
    for _ in range(RATE_REPEATS):
        start = time.perf_counter()
        jax.block_until_ready([multiply(x, y) for _ in range(RATE_CALLS)])
        timings.append((time.perf_counter() - start) / RATE_CALLS)
    return 2 * side**3 / min(timings)


def random_array(leaf: Any, seed: int, scale: float) -> Any:
    """A normal array like the abstract `leaf`, from a hash of each element's index.

    One elementwise kernel that needs no memory but the result's. `jax.random` holds the bits of the whole array,
    several times its size, and the peak that is measured later would be that of making the weights.
    """
    import jax
    import jax.numpy as jnp

    from jora.kernels.counter_hash import mix

    def make() -> Any:
        counter = jnp.arange(math.prod(leaf.shape), dtype=jnp.uint32).reshape(leaf.shape)
        bits = mix(counter * jnp.uint32(0x9E3779B9) ^ mix(jnp.uint32(seed + 1)))
        uniform = ((bits >> 9).astype(jnp.float32) + 0.5) * 2.0**-22 - 1.0
        return (scale * math.sqrt(2) * jax.lax.erf_inv(uniform)).astype(leaf.dtype)

    return jax.jit(make, out_shardings=leaf.sharding)()


def random_weights(config: Any, layout: Any, dtype: Any) -> Any:
    """Weights as Llama starts from: normal of 0.02, norms 1; the peak is the weights' own bytes."""
    import jax
    import jax.numpy as jnp

    from jora.models.params import abstract_params

    structure: Any
    leaves, structure = jax.tree.flatten_with_path(abstract_params(config, layout, dtype))
    made = []
    for seed, (path, leaf) in enumerate(leaves):
        if "norm" in jax.tree_util.keystr(path):
            made.append(jax.device_put(jnp.ones(leaf.shape, leaf.dtype), leaf.sharding))
        else:
            made.append(random_array(leaf, seed, 0.02))
    return jax.block_until_ready(structure.unflatten(made))
