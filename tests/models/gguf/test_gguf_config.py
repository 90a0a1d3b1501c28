"""Configurations read from GGUF metadata; test_gguf_source shows that transformers computes the model with them."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import transformers

from jora.errors import InputError
from jora.models.gguf import GGUFFile, GGUFSource, hf_config

# the models as published: architecture, metadata, what their own config.json says
PUBLISHED = {
    "Llama-2-7B": (
        "llama",
        {"embedding_length": 4096, "head_count": 32, "block_count": 32, "rope_dimension_count": 128},
        {"model_type": "llama", "head_dim": 128, "num_key_value_heads": 32, "rope_theta": 10000.0},
    ),
    "Gemma-2-9B": (
        "gemma2",
        {"embedding_length": 3584, "head_count": 16, "head_count_kv": 8, "block_count": 42, "key_length": 256,
         "sliding_window": 4096},
        {"query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
         "rope_theta": 10000.0, "head_dim": 256},
    ),
    "Gemma-2-27B": (
        "gemma2",
        {"embedding_length": 4608, "head_count": 32, "head_count_kv": 16, "block_count": 46, "key_length": 128,
         "sliding_window": 4096},
        {"query_pre_attn_scalar": 144, "head_dim": 128},
    ),
    "Gemma-3-270M": (
        "gemma3",
        {"embedding_length": 640, "head_count": 4, "head_count_kv": 1, "block_count": 18, "key_length": 256,
         "sliding_window": 512, "rope_freq_base": 1e6},
        {"model_type": "gemma3_text", "head_dim": 256, "num_key_value_heads": 1, "sliding_window": 512,
         "rope_local_base_freq": 10000.0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6,
         "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3},
    ),
    "Gemma-3-27B": (
        "gemma3",
        {"embedding_length": 5376, "head_count": 32, "head_count_kv": 16, "block_count": 62, "key_length": 128,
         "sliding_window": 1024, "rope_freq_base": 1e6},
        {"query_pre_attn_scalar": 168, "head_dim": 128, "num_hidden_layers": 62},
    ),
    "Mistral-7B-v0.1": (
        "llama",
        {"embedding_length": 4096, "head_count": 32, "head_count_kv": 8, "block_count": 32,
         "rope_dimension_count": 128, "sliding_window": 4096},
        {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 4096},
    ),
    "Qwen3-0.6B": (
        "qwen3",
        {"embedding_length": 1024, "head_count": 16, "head_count_kv": 8, "block_count": 28, "key_length": 128,
         "rope_freq_base": 1e6},
        {"head_dim": 128, "use_sliding_window": False, "attention_bias": False},
    ),
}  # fmt: skip


def write(path, architecture, settings, *, eps=1e-6, tensors=None):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_layer_norm_rms_eps(eps)
    writer.add_context_length(8192)
    writer.add_feed_forward_length(128)
    for name, value in settings.items():
        getattr(writer, f"add_{name}")(value)
    hidden = settings.get("embedding_length", 64)
    for name, value in ({"token_embd.weight": np.zeros((4, hidden), np.float32)} | (tensors or {})).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


SMALL = {"embedding_length": 64, "head_count": 4, "block_count": 2}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name, tmp_path):
    architecture, settings, expected = PUBLISHED[name]
    config = hf_config(GGUFFile(write(tmp_path / "m.gguf", architecture, settings)))
    assert {key: config[key] for key in expected} == expected
    loaded = transformers.AutoConfig.for_model(**config)
    assert loaded.vocab_size == 4 and loaded.tie_word_embeddings
    for key, value in expected.items():
        if not key.startswith("rope"):
            assert getattr(loaded, key) == value


def test_end_of_turn_joins_end_of_text(tmp_path):
    ends = {"bos_token_id": 0, "eos_token_id": 1, "eot_token_id": 3}
    assert hf_config(GGUFFile(write(tmp_path / "m.gguf", "llama", SMALL | ends)))["eos_token_id"] == [1, 3]


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_factors_are_recovered(tiny, factor):
    rope = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}  # fmt: skip
    model = tiny("llama3", changes={"rope_scaling": rope, "head_dim": 64})
    source = GGUFSource(model.path)
    assert source.hf_config["rope_scaling"] == rope
    assert "rope_freqs.weight" not in source.names()


def test_foreign_rope_factors_are_refused(tmp_path):
    factors = {"rope_freqs.weight": np.linspace(1, 8, 8, dtype=np.float32)}
    path = write(tmp_path / "m.gguf", "llama", SMALL | {"rope_freq_base": 500000.0}, tensors=factors)
    with pytest.raises(InputError, match=r"rope_freqs\.weight follows no known"):
        hf_config(GGUFFile(path))


@pytest.mark.parametrize(
    ("architecture", "settings", "message"),
    [
        ("falcon", SMALL, "architecture falcon is not supported; supported are llama"),
        ("llama", SMALL | {"rope_scaling_type": gguf.RopeScalingType.YARN}, "rope scaling yarn"),
        ("llama", {"embedding_length": 64, "head_count": 4}, r"llama\.block_count"),
        ("llama", SMALL | {"key_length": 16, "rope_dimension_count": 8}, "rotates 8 of 16"),
        ("llama", SMALL | {"head_count_kv": [2, 4]}, "differs from layer to layer"),
        ("gemma3", SMALL | {"sliding_window": 4}, r"gemma3\.rope\.freq_base"),
        ("gemma2", SMALL, r"gemma2\.attention\.sliding_window"),
    ],
)
def test_refusals_name_what_is_wrong(tmp_path, architecture, settings, message):
    path = write(tmp_path / "m.gguf", architecture, settings)
    with pytest.raises(InputError, match=message) as raised:
        hf_config(GGUFFile(path))
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)
