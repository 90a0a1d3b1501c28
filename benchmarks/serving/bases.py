"""Base models of random weights and adapters of random factors, as the directories that every contestant loads."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

_HEADS = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False, **_HEADS}
_GEMMA = {
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}

B_SCALE = 0.2  # of B's entries: strong enough that another adapter's answer is another one


def _sizes(width: int, mlp: int, layers: int, heads: int, kv_heads: int, head: int, vocab: int) -> dict[str, int]:
    attention = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head}
    model = {"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers, "vocab_size": vocab}
    return {**model, **attention, "max_position_embeddings": 4096}


def _gemma(sizes: dict[str, int], window: int) -> dict[str, Any]:
    # A layer of full attention after every five windowed ones.
    kinds = ["full_attention" if (n + 1) % 6 == 0 else "sliding_attention" for n in range(sizes["num_hidden_layers"])]
    scale = {"query_pre_attn_scalar": sizes["head_dim"]}
    return {**_GEMMA, **sizes, **scale, "sliding_window": window, "layer_types": kinds}


BASES: dict[str, dict[str, Any]] = {
    "gemma-270m": _gemma(_sizes(640, 2048, 18, 4, 1, 256, 262_144), window=512),
    "llama-110m": {**_LLAMA, **_sizes(768, 2048, 12, 12, 4, 64, 32_000)},
    "tiny": {**_LLAMA, **_sizes(64, 128, 2, 4, 2, 16, 512)},
}


def write_base(name: str, directory: Path) -> None:
    """A Hugging Face directory of random fp32 weights in one of the shapes of BASES, every word of it a number."""
    from dataclasses import replace

    import jax
    import jax.numpy as jnp

    from jora.models.families import config_from_hf
    from jora.models.model import Model
    from jora.models.params import random_params
    from jora.models.saving import save_model
    from jora.sharding import single_device

    hf = BASES[name]
    config, layout = config_from_hf(hf), single_device()
    params = random_params(config, layout, jnp.float32)
    if not config.norm_offset:  # norms that multiply by almost nothing would silence the layers, and every adapter
        norms = jax.tree.map(lambda norm: 1 + norm, params.layers.norms)
        params = replace(params, layers=replace(params.layers, norms=norms), final_norm=1 + params.final_norm)
    save_model(Model(params, config, layout, hf, "", {}), directory)
    _write_tokenizer(hf, directory)


def _write_tokenizer(hf: dict[str, Any], directory: Path) -> None:
    import tokenizers

    words = {f"w{number}": number for number in range(hf["vocab_size"])}
    model = tokenizers.models.WordLevel(words, unk_token="w0")
    tokenizers.Tokenizer(model).save(str(directory / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0", "eos_token": f"w{hf['eos_token_id']}"}
    (directory / "tokenizer_config.json").write_text(json.dumps(names))


def adapter_name(number: int) -> str:
    return f"adapter-{number:05d}"


def write_adapters(base: Path, directory: Path, count: int, ranks: Sequence[int], distinct: int) -> None:
    """`count` LoRA adapters on all linears in PEFT's format, adapter i of rank ranks[i % len(ranks)].

    Only `distinct` of each rank are written; the others are hard links to those, so that thousands cost no disk. An
    engine cannot tell: names, and what it keeps under them, are apart.
    """
    from jora.train.estimation import read_config

    config = read_config(base)
    written: dict[tuple[int, int], Path] = {}
    for number in range(count):
        target = directory / adapter_name(number)
        target.mkdir(parents=True)
        rank, draw = ranks[number % len(ranks)], number // len(ranks) % distinct
        if (source := written.get((rank, draw))) is None:
            written[rank, draw] = target
            _write_adapter(config, base.name, target, rank, seed=number)
            continue
        for file in source.iterdir():
            os.link(file, target / file.name)


def _write_adapter(config: Any, base: str, target: Path, rank: int, seed: int) -> None:
    from safetensors.numpy import save_file

    from .decode_floor import linears

    random, tensors = np.random.default_rng(seed), {}
    shapes = linears(config)
    for layer in range(config.layers):
        for name, (into, out) in shapes.items():
            block = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            module = f"base_model.model.model.layers.{layer}.{block}.{name}"
            a, b = random.standard_normal((rank, into)), random.standard_normal((out, rank))
            tensors[f"{module}.lora_A.weight"] = (a / np.sqrt(into)).astype(np.float32)
            tensors[f"{module}.lora_B.weight"] = (B_SCALE * b).astype(np.float32)
    save_file(tensors, target / "adapter_model.safetensors")
    options = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank}
    modules = {"target_modules": list(shapes), "base_model_name_or_path": base, "bias": "none"}
    (target / "adapter_config.json").write_text(json.dumps({**options, **modules}))
