"""From a Hugging Face `config.json` to a ModelConfig, one small function a family.

What is not known here is refused by name: a model that loads computes what transformers computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from jora.errors import InputError
from jora.models.config import LayerKind, ModelConfig, Rope

Json = Mapping[str, Any]
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
KINDS: dict[str, LayerKind] = {"full_attention": "full", "sliding_attention": "sliding"}


QWEN_WINDOW: Json = {"sliding_window": 4096, "max_window_layers": 28}  # where use_sliding_window asks for one
# What transformers fills in where a config.json says nothing, as far as it differs between the families.
DEFAULTS: dict[str, Json] = {
    "mistral": {"max_position_embeddings": 131_072, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32_768, **QWEN_WINDOW},
    "qwen3": {"max_position_embeddings": 32_768, "head_dim": 128, **QWEN_WINDOW},
    "gemma": {"max_position_embeddings": 8192},
    "gemma2": {"max_position_embeddings": 8192},
    "gemma3_text": {"max_position_embeddings": 131_072},
}


def config_from_hf(hf: Json) -> ModelConfig:
    """Read a parsed config.json. Raises InputError for an architecture or option that Jora does not have."""
    family = hf.get("model_type")
    if family not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise InputError(f"config.json: model_type {family!r} is not supported; supported are {known}")
    if hf.get("quantization_config"):
        raise InputError("config.json: quantization_config is set; use the unquantised model of the same name")
    return FAMILIES[family]({**DEFAULTS.get(family, {}), **hf})


def _require(hf: Json, key: str) -> Any:
    if hf.get(key) is None:
        raise InputError(f"config.json: {key} is missing")
    return hf[key]


def _base(hf: Json, **overrides: Any) -> ModelConfig:
    embed, heads = _require(hf, "hidden_size"), _require(hf, "num_attention_heads")
    kv_heads = hf.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise InputError(f"config.json: {heads} attention heads are no multiple of {kv_heads} KV heads")
    layers = _require(hf, "num_hidden_layers")
    head_dim = hf.get("head_dim") or embed // heads
    rope = _rope(hf, "full_attention")
    config = ModelConfig(
        family=hf["model_type"],
        vocab_size=_require(hf, "vocab_size"),
        embed=embed,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp=_require(hf, "intermediate_size"),
        layer_kinds=("full",) * layers,
        rope=rope,
        rope_sliding=rope,
        activation=_activation(hf.get("hidden_act") or "silu"),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        attention_scale=head_dim**-0.5,
        tied_embeddings=hf.get("tie_word_embeddings", False),
        max_positions=hf.get("max_position_embeddings", 2048),
    )
    if hf.get("mlp_bias"):
        raise InputError("config.json: mlp_bias is not supported")
    return replace(config, **overrides)


def _activation(name: str) -> Any:
    if name not in ACTIVATIONS:
        raise InputError(f"config.json: activation {name!r} is not supported; supported are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _rope(hf: Json, layer_type: str) -> Rope:
    """The rotary settings of a layer type, from `rope_parameters` (transformers 5) or `rope_scaling` (before)."""
    parameters = hf.get("rope_parameters") or {}
    nested = parameters.get(layer_type)
    if nested is None and any(isinstance(v, Mapping) for v in parameters.values()):
        raise InputError(f"config.json: rope_parameters has no entry for {layer_type}")
    settings = {"rope_theta": hf.get("rope_theta"), **(hf.get("rope_scaling") or {}), **(nested or parameters)}
    theta = float(settings.get("rope_theta") or 10000.0)
    if hf.get("partial_rotary_factor", settings.get("partial_rotary_factor") or 1.0) not in (None, 1.0):
        raise InputError("config.json: partial_rotary_factor is not supported")
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, "linear", float(settings["factor"]))
    if kind == "llama3":
        return Rope(
            theta,
            "llama3",
            float(settings["factor"]),
            float(settings["low_freq_factor"]),
            float(settings["high_freq_factor"]),
            int(settings["original_max_position_embeddings"]),
        )
    raise InputError(f"config.json: rope type {kind!r} is not supported; supported are default, linear, llama3")


def _layer_kinds(hf: Json, default: Callable[[int], LayerKind]) -> tuple[LayerKind, ...]:
    layers = hf["num_hidden_layers"]
    names = hf.get("layer_types")
    if names is None:
        return tuple(default(i) for i in range(layers))
    unknown = set(names) - set(KINDS)
    if unknown or len(names) != layers:
        raise InputError(f"config.json: layer_types must name {layers} layers of {', '.join(KINDS)}; found {names}")
    return tuple(KINDS[name] for name in names)


def _llama(hf: Json) -> ModelConfig:
    bias = bool(hf.get("attention_bias", False))
    return _base(hf, qkv_bias=bias, o_bias=bias)


def _mistral(hf: Json) -> ModelConfig:
    window = hf.get("sliding_window")
    kinds: tuple[LayerKind, ...] = ("sliding" if window else "full",) * hf["num_hidden_layers"]
    return _base(hf, window=window, layer_kinds=kinds)


def _qwen_windows(hf: Json) -> dict[str, Any]:
    if not hf.get("use_sliding_window"):
        return {}
    window, first = hf.get("sliding_window"), hf["max_window_layers"]
    kinds = _layer_kinds(hf, lambda i: "sliding" if window is not None and i >= first else "full")
    return {"window": window, "layer_kinds": kinds}


def _qwen2(hf: Json) -> ModelConfig:
    return _base(hf, qkv_bias=True, **_qwen_windows(hf))


def _qwen3(hf: Json) -> ModelConfig:
    bias = bool(hf.get("attention_bias", False))
    return _base(hf, qk_norm=True, qkv_bias=bias, o_bias=bias, **_qwen_windows(hf))


def _gemma(hf: Json) -> ModelConfig:
    named = hf.get("hidden_act")
    # The "gelu" of the official files meant the tanh form; `hidden_activation` came with Gemma 2 and is not read here.
    return _gemma_base({**hf, "hidden_activation": None if named == "gelu" else named})


def _gemma_base(hf: Json, **overrides: Any) -> ModelConfig:
    # Gemma's own configs leave out what equals the family's defaults.
    named = hf.get("hidden_activation") or "gelu_pytorch_tanh"
    filled = {"tie_word_embeddings": True, "head_dim": 256, **hf, "hidden_act": named}
    bias = bool(hf.get("attention_bias", False))
    scale = math.sqrt(filled["hidden_size"])
    return _base(filled, norm_offset=True, embed_scale=scale, qkv_bias=bias, o_bias=bias, **overrides)


def _gemma2(hf: Json) -> ModelConfig:
    return _gemma_base(
        hf,
        sandwich_norms=True,
        window=hf.get("sliding_window", 4096),
        layer_kinds=_layer_kinds(hf, lambda i: "full" if i % 2 else "sliding"),
        attention_scale=hf.get("query_pre_attn_scalar", 256) ** -0.5,
        attention_cap=hf.get("attn_logit_softcapping", 50.0),
        logit_cap=hf.get("final_logit_softcapping", 30.0),
    )


def _gemma3(hf: Json) -> ModelConfig:
    if hf.get("use_bidirectional_attention"):
        raise InputError("config.json: use_bidirectional_attention is not supported")
    if hf.get("attn_logit_softcapping"):
        raise InputError("config.json: attn_logit_softcapping is not supported for gemma3 (transformers ignores it)")
    pattern = hf.get("sliding_window_pattern") or hf.get("_sliding_window_pattern") or 6
    if "rope_parameters" in hf:
        full, local = _rope(hf, "full_attention"), _rope(hf, "sliding_attention")
    else:
        full = _rope({"rope_theta": 1_000_000.0, **hf}, "full_attention")
        local = Rope(float(hf.get("rope_local_base_freq", 10_000.0)))
    config = _gemma_base(
        {**hf, "rope_parameters": None},
        sandwich_norms=True,
        qk_norm=True,
        window=hf.get("sliding_window", 4096),
        layer_kinds=_layer_kinds(hf, lambda i: "sliding" if (i + 1) % pattern else "full"),
        attention_scale=hf.get("query_pre_attn_scalar", 256) ** -0.5,
        logit_cap=hf.get("final_logit_softcapping"),
    )
    return replace(config, rope=full, rope_sliding=local)


FAMILIES: dict[str, Callable[[Json], ModelConfig]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
}
