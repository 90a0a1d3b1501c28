"""GGUF metadata to the contents of a Hugging Face `config.json`.

What the metadata leave out is a constant of the family; those stand in `_CONSTANTS`, as llama.cpp has them in code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from gguf.quants import dequantize
from jora.errors import InputError
from jora.models.gguf.reader import GGUFFile

GEMMAS = frozenset({"gemma", "gemma2", "gemma3"})
ROPE_FACTORS = "rope_freqs.weight"
"""Llama 3.1's rope scaling: what each rotary frequency is divided by, float32 [head_dim / 2]."""

_GELU = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
_CONSTANTS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "mlp_bias": False},
    "qwen2": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_act": "silu",
        "use_sliding_window": False,
        "sliding_window": None,
    },
    "qwen3": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_act": "silu",
        "use_sliding_window": False,
        "sliding_window": None,
    },
    "gemma": {"model_type": "gemma", "architectures": ["GemmaForCausalLM"], **_GELU},
    "gemma2": {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], **_GELU},
    "gemma3": {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], **_GELU},
}
_BIASLESS = ("llama", "qwen3", *sorted(GEMMAS))
_DEFAULT_THETA = {"llama": 10_000.0, "gemma": 10_000.0, "gemma2": 10_000.0}  # families that may leave the key out
_GEMMA2_SOFT_CAPS = (50.0, 30.0)  # attention, final
_WINDOW_PERIOD = {"gemma2": 2, "gemma3": 6}  # the last layer of each period attends to everything
_GEMMA3_LOCAL_THETA = 10_000.0
# the 27B models, known by their depth, scale queries by hidden size / heads, all others by head_dim
_27B_LAYERS = {"gemma2": 46, "gemma3": 62}
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class _Keys:
    """The metadata of one file under its architecture's prefix."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.architecture = file.architecture

    def get(self, key: str, default: Any = None) -> Any:
        return self.file.metadata.get(f"{self.architecture}.{key}", default)

    def count(self, key: str, default: int | None = None) -> int:
        return int(self.number(key, default))

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if value is None:
            raise self.refusal(f"metadata lack {self.architecture}.{key}")
        if isinstance(value, np.ndarray):
            raise self.refusal(f"{self.architecture}.{key} differs from layer to layer, which is not supported")
        return float(value)

    def refusal(self, message: str) -> InputError:
        return InputError(f"{self.file.path}: {message}")


def hf_config(file: GGUFFile) -> dict[str, Any]:
    """The Hugging Face `config.json` of the model in `file`, as a dict.

    Raises:
        InputError: an architecture, rope scaling or per-layer setting outside the supported families, or a
            missing key, each by name.
    """
    keys = _Keys(file)
    if keys.architecture not in _CONSTANTS:
        known = ", ".join(_CONSTANTS)
        raise keys.refusal(f"architecture {keys.architecture} is not supported; supported are {known}")
    config = _CONSTANTS[keys.architecture] | _sizes(keys) | _tokens(file)
    if keys.architecture in _BIASLESS:
        config["attention_bias"] = False
    config["rope_scaling"] = _rope_scaling(keys, config)
    config |= _FAMILY[keys.architecture](keys, config)
    return config


def _sizes(keys: _Keys) -> dict[str, Any]:
    tensors = keys.file.tensors
    if "token_embd.weight" not in tensors:
        raise keys.refusal("has no tensor token_embd.weight; a model needs its embedding")
    vocabulary, hidden = tensors["token_embd.weight"].shape
    heads = keys.count("attention.head_count")
    if hidden != keys.count("embedding_length"):
        raise keys.refusal(
            f"token_embd.weight has rows of {hidden}, embedding_length is {keys.get('embedding_length')}"
        )
    # llama files state the head size as the rotary dimension only
    rotary = keys.get("rope.dimension_count")
    head_dim = int(keys.get("attention.key_length", rotary) or hidden // heads)
    if rotary not in (None, head_dim):
        raise keys.refusal(f"rotates {rotary} of {head_dim} dimensions of a head, which is not supported")
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": keys.count("feed_forward_length"),
        "num_hidden_layers": keys.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.count("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.number("rope.freq_base", _DEFAULT_THETA.get(keys.architecture)),
        "attention_dropout": 0.0,
        "tie_word_embeddings": "output.weight" not in tensors,
    }


def _tokens(file: GGUFFile) -> dict[str, Any]:
    def identifier(name: str) -> int | None:
        value = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        return None if value is None else int(value)

    eos, end_of_turn = identifier("eos"), identifier("eot")
    several = eos is not None and end_of_turn not in (None, eos)
    return {
        "bos_token_id": identifier("bos"),
        "eos_token_id": [eos, end_of_turn] if several else eos,
        "pad_token_id": identifier("padding"),
    }


def _rope_scaling(keys: _Keys, config: dict[str, Any]) -> dict[str, Any] | None:
    kind = keys.get("rope.scaling.type", "none")
    if ROPE_FACTORS in keys.file.tensors:
        if kind != "none":
            raise keys.refusal(f"has both {ROPE_FACTORS} and rope scaling {kind}, which is not supported")
        return _llama3_scaling(keys, config)
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": keys.number("rope.scaling.factor")}
    raise keys.refusal(f"rope scaling {kind} is not supported; supported are none, linear and Llama 3's")


def _llama3_scaling(keys: _Keys, config: dict[str, Any]) -> dict[str, Any] | None:
    """The setting that gave the stored factors: the largest is `factor`, the rest must follow from Llama 3's rule."""
    tensor = keys.file.tensors[ROPE_FACTORS]
    found = dequantize(keys.file.blocks(tensor).reshape(1, -1), tensor.kind).reshape(-1)
    if (found == 1).all():
        return None
    original = keys.get("rope.scaling.original_context_length", _LLAMA3_ROPE["original_max_position_embeddings"])
    scaling = _LLAMA3_ROPE | {
        "rope_type": "llama3",
        "factor": float(str(found.max())),
        "original_max_position_embeddings": int(original),
    }
    expected = llama3_factors(config["head_dim"], config["rope_theta"], scaling)
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-5, atol=0):
        raise keys.refusal(
            f"{ROPE_FACTORS} follows no known Llama 3 rope scaling"
            f" (tried factor {scaling['factor']:g}, original length {original}); use the model's HF directory"
        )
    return scaling


def llama3_factors(head_dim: int, theta: float, scaling: dict[str, Any]) -> np.ndarray:
    """What Llama 3.1 divides each rotary frequency by, float32 [head_dim / 2].

    Wavelengths under original / high_freq_factor are kept, those over original / low_freq_factor stretched by
    `factor`, and between them the frequency is interpolated (Llama 3.1 model card's `apply_scaling`).
    """
    frequency = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 / ((1 - keep) / scaling["factor"] + keep)).astype(np.float32)


def _llama(keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    window = keys.get("attention.sliding_window")
    if not window:
        return {}
    # llama.cpp has no architecture of its own for Mistral; the window is what tells them apart
    return {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": int(window)}


def _plain(keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    return {}


def _gemma2(keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    attention, final = _GEMMA2_SOFT_CAPS
    return _windows(keys, config) | {
        "query_pre_attn_scalar": _query_scalar(keys, config),
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", attention),
        "final_logit_softcapping": keys.number("final_logit_softcapping", final),
    }


def _gemma3(keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    final = keys.get("final_logit_softcapping")
    return _windows(keys, config) | {
        "query_pre_attn_scalar": _query_scalar(keys, config),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None if not final else float(final),
        "rope_local_base_freq": keys.number("rope.freq_base_swa", _GEMMA3_LOCAL_THETA),
    }


def _windows(keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    period = keys.get("attention.sliding_window_pattern", _WINDOW_PERIOD[keys.architecture])
    layers = range(config["num_hidden_layers"])
    # newer files may state each layer's kind instead of a period
    sliding = period.tolist() if isinstance(period, np.ndarray) else [bool((i + 1) % int(period)) for i in layers]
    if len(sliding) != len(layers):
        raise keys.refusal(f"attention.sliding_window_pattern names {len(sliding)} of {len(layers)} layers")
    kinds = ["sliding_attention" if flag else "full_attention" for flag in sliding]
    stated = {} if isinstance(period, np.ndarray) else {"sliding_window_pattern": int(period)}
    return stated | {"sliding_window": keys.count("attention.sliding_window"), "layer_types": kinds}


def _query_scalar(keys: _Keys, config: dict[str, Any]) -> int:
    if config["num_hidden_layers"] == _27B_LAYERS[keys.architecture]:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config["head_dim"])


_FAMILY: dict[str, Callable[[_Keys, dict[str, Any]], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2": _plain,
    "qwen3": _plain,
    "gemma": _plain,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
}
