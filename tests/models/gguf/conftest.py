"""Writes small GGUF files the way llama.cpp's converter does, from random Hugging Face models."""

from __future__ import annotations

import copy
import math
import pydoc_data.topics
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType

HEADS, LAYERS, VOCABULARY = 4, 4, 320
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# what differs from COMMON: odd shapes are spread over the families
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "llama", {"tie_word_embeddings": False}),
    "llama3": ("llama", "llama", {"rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "mistral": ("llama", "mistral", {"sliding_window": 5, "num_key_value_heads": 1}),
    "qwen2": ("qwen2", "qwen2", {"tie_word_embeddings": True, "rope_theta": 1e6}),
    # transformers reads no head_dim for this architecture from a GGUF and takes its default, 128
    "qwen3": ("qwen3", "qwen3", {"head_dim": 128, "rope_theta": 1e6}),
    "gemma": ("gemma", "gemma", {"head_dim": 32, "num_key_value_heads": 1}),
    "gemma2": ("gemma2", "gemma2", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 5}),
    "gemma3": (
        "gemma3",
        "gemma3_text",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 5,
            "num_hidden_layers": 7,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
    ),
    "gemma3-long": (
        "gemma3",
        "gemma3_text",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 5,
            "num_hidden_layers": 7,
            "rope_theta": 1e6,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
}


@dataclass
class Tiny:
    """A random Hugging Face model and the GGUF file written from it."""

    path: Path
    model: transformers.PreTrainedModel
    state: dict[str, np.ndarray]


@dataclass
class Vocabulary:
    """The tokenizer section of a GGUF file."""

    model: str
    tokens: list[str]
    kinds: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    pre: str = "default"
    settings: dict[str, Any] = field(default_factory=dict)


def write_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    for name, value in vocabulary.settings.items():
        getattr(writer, f"add_{name}")(value)


def plain_vocabulary(size: int) -> Vocabulary:
    tokens = ["<unk>", "<s>", "</s>", *(f"t{number}" for number in range(size - 3))]
    scores = [-float(number) for number in range(size)]
    settings = {"bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0, "pad_token_id": 0}
    return Vocabulary("llama", tokens, [2, 3, 3, *[1] * (size - 3)], scores, settings=settings)


def llama_cpp_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def llama_cpp_rope_factors(config: Any) -> np.ndarray:
    """Llama 3.1's factors, frequency by frequency as the converter computes them."""
    rope = config.rope_parameters
    original, low, high = rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"]
    factors = []
    for i in range(0, config.head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / config.head_dim)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(rope["factor"])
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


def _add_settings(writer: gguf.GGUFWriter, architecture: str, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if architecture == "llama":
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(config.head_dim)
    elif architecture != "qwen2":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    if architecture not in ("gemma", "gemma2"):
        writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if config.model_type in ("mistral", "gemma2", "gemma3_text"):
        writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _stored(architecture: str, config: Any, name: str, value: np.ndarray) -> np.ndarray:
    if architecture == "llama" and "q_proj" in name:
        return llama_cpp_rows(value, config.num_attention_heads)
    if architecture == "llama" and "k_proj" in name:
        return llama_cpp_rows(value, config.num_key_value_heads)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return value + 1
    return value


def write_gguf(
    path: Path,
    architecture: str,
    model: transformers.PreTrainedModel,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    extra: dict[str, np.ndarray] | None = None,
    raw: GGMLQuantizationType | None = None,
) -> None:
    """`model` as llama.cpp would write it, matrices as `kind`; `extra` tensors (uint8: blocks of `raw`) go on top."""
    config = model.config
    architecture_id = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(architecture_id, config.num_hidden_layers)
    tensors: dict[str, np.ndarray] = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stored_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored_name is not None, name
        tensors[stored_name] = _stored(architecture, config, name, value.numpy())
    if config.rope_parameters.get("rope_type") == "llama3":
        tensors["rope_freqs.weight"] = llama_cpp_rope_factors(config)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    _add_settings(writer, architecture, config)
    write_vocabulary(writer, plain_vocabulary(config.vocab_size))
    for name, value in (tensors | (extra or {})).items():
        if value.dtype == np.uint8:
            writer.add_tensor(name, value, raw_dtype=raw)
        elif value.ndim == 2 and kind is not GGMLQuantizationType.F32:
            writer.add_tensor(name, gguf.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _config_of(family: str, changes: dict[str, Any]) -> tuple[str, Any]:
    architecture, model_type, options = FAMILIES[family]
    tied = {"tie_word_embeddings": True} if architecture.startswith("gemma") else {}
    settings = copy.deepcopy(COMMON | tied | options | changes)  # transformers edits rope_scaling in place
    if architecture == "qwen2":
        settings.pop("head_dim")
    config = transformers.AutoConfig.for_model(model_type, **settings)
    if architecture == "qwen2":
        config.head_dim = config.hidden_size // config.num_attention_heads
    return architecture, config


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Tiny]:
    """Factory: `tiny("gemma3", kind=..., extra=..., changes={...})` gives a model with random norms and biases."""

    def build(family: str, *, changes: dict[str, Any] | None = None, **options: Any) -> Tiny:
        architecture, config = _config_of(family, changes or {})
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms and biases start at constants, which would hide a mistake
                torch.nn.init.normal_(parameter, 0.0 if "gemma" in family or "bias" in name else 1.0, 0.2)
        path = tmp_path / f"{family}.gguf"
        write_gguf(path, architecture, model, **options)
        return Tiny(path, model, {name: value.numpy() for name, value in model.state_dict().items()})

    return build


@pytest.fixture(scope="session")
def strings() -> list[str]:
    """10,000 strings: documentation, code, digits, spaces, control characters, Unicode, text of special tokens."""
    rng = random.Random(0)
    lines = [line for topic in pydoc_data.topics.topics.values() for line in topic.splitlines()]
    special = ["<s>", "</s>", "<bos>", "<eos>", "<unk>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<think>",
               "<start_of_turn>", "<h1>", "<0x0A>", "[INST]", "<unused7>", "<|eot_id|>"]  # fmt: skip
    spaces = [" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", "\u00a0", "\u2003", "\u2581", "\u3000", " " * 33, "\n" * 35]
    controls = [chr(number) for number in [*range(32), 127, 0x85, 0xFEFF, 0x200D, 0x202E]]
    planes = [(0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x5FF), (0x600, 0x6FF), (0x900, 0x97F),
              (0xE00, 0xE7F), (0x1100, 0x11FF), (0x2000, 0x2BFF), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3),
              (0x1F300, 0x1FAFF), (0x20000, 0x2A6DF), (0xE000, 0xF8FF)]  # fmt: skip

    def unicode_run() -> str:
        low, high = rng.choice(planes)
        return "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 12)))

    makers: list[Callable[[], str]] = [
        lambda: rng.choice(lines),
        lambda: rng.choice(lines),
        lambda: " ".join(rng.choice(lines).split()[: rng.randint(1, 6)]),
        unicode_run,
        lambda: rng.choice(spaces),
        lambda: rng.choice(special),
        lambda: str(rng.randint(0, 10 ** rng.randint(1, 20))),
        lambda: f"def f{rng.randint(0, 99)}(x):\n    return x['{rng.choice(lines)[:8]}'] + {rng.random():.4f}\n",
        lambda: "".join(rng.choice(controls) for _ in range(3)),
        lambda: rng.choice(
            ["it's", "WE'LL", "don't", "I'M", "caf\u00e9", "cafe\u0301", "\u1100\u1161\u11a8", "\uff21\uff11", "\ufb01"]
        ),
    ]
    return ["", *("".join(rng.choice(makers)() for _ in range(rng.randint(1, 5))) for _ in range(9_999))]
