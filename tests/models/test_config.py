"""config.json to ModelConfig: old and new spellings alike, and refusals by name."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from jora.errors import InputError
from jora.models.config import Rope
from jora.models.families import config_from_hf
from jora.models.tensors import parameter_count

LLAMA31_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA2: dict[str, Any] = dict(
    model_type="llama",
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    vocab_size=32000,
    rms_norm_eps=1e-5,
    max_position_embeddings=4096,
    rope_scaling=None,
)
# As released, with transformers 4 and before.
OLD: dict[str, dict[str, Any]] = {
    "llama2": {**LLAMA2, "num_key_value_heads": 32, "tie_word_embeddings": False},
    "llama31": dict(
        model_type="llama",
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128256,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=LLAMA31_SCALING,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        hidden_act="silu",
    ),
    "mistral": dict(
        model_type="mistral",
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        sliding_window=4096,
        rope_theta=10000.0,
        tie_word_embeddings=False,
    ),
    "mistral without windows": dict(
        model_type="mistral",
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=4,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32768,
        sliding_window=None,
        rope_theta=1000000.0,
    ),
    "qwen25": dict(
        model_type="qwen2",
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151936,
        rope_theta=1000000.0,
        sliding_window=32768,
        max_window_layers=21,
        use_sliding_window=False,
        tie_word_embeddings=True,
    ),
    "qwen2 with windows": dict(
        model_type="qwen2",
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151936,
        rope_theta=1000000.0,
        sliding_window=4096,
        max_window_layers=21,
        use_sliding_window=True,
    ),
    "qwen3": dict(
        model_type="qwen3",
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        rope_theta=1000000,
        tie_word_embeddings=True,
    ),
    "gemma": dict(
        model_type="gemma",
        hidden_size=2048,
        intermediate_size=16384,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=256,
        vocab_size=256000,
        hidden_act="gelu",
        hidden_activation="gelu_pytorch_tanh",
        rope_theta=10000.0,
    ),
    "gemma2": dict(
        model_type="gemma2",
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        vocab_size=256000,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        query_pre_attn_scalar=256,
        sliding_window=4096,
        hidden_activation="gelu_pytorch_tanh",
        rope_theta=10000.0,
    ),
    "gemma3": dict(
        model_type="gemma3_text",
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        vocab_size=262144,
        query_pre_attn_scalar=256,
        sliding_window=512,
        sliding_window_pattern=6,
        rope_theta=1000000.0,
        rope_local_base_freq=10000.0,
        rope_scaling=None,
        max_position_embeddings=32768,
    ),
    "gemma3 scaled": dict(
        model_type="gemma3_text",
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=34,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        vocab_size=262208,
        query_pre_attn_scalar=256,
        sliding_window=1024,
        sliding_window_pattern=6,
        rope_theta=1000000.0,
        rope_local_base_freq=10000.0,
        rope_scaling={"factor": 8.0, "rope_type": "linear"},
    ),
}


@pytest.mark.parametrize("name", OLD)
def test_old_and_new_files_read_the_same(name):
    old = OLD[name]
    new = AutoConfig.for_model(old["model_type"], **{k: v for k, v in old.items() if k != "model_type"}).to_dict()
    assert "rope_parameters" in new
    assert config_from_hf(old) == config_from_hf(new)


def test_what_old_files_say_is_read():
    gemma = config_from_hf(OLD["gemma3 scaled"])
    assert gemma.rope == Rope(1e6, "linear", 8.0)
    assert gemma.rope_sliding == Rope(1e4)
    assert gemma.layer_kinds[:7] == ("sliding",) * 5 + ("full", "sliding")
    llama = config_from_hf(OLD["llama31"])
    assert llama.rope == Rope(5e5, "llama3", 8.0, 1.0, 4.0, 8192)
    assert config_from_hf({**OLD["llama31"], "rope_scaling": {**LLAMA31_SCALING, "type": "llama3"}}) == llama
    assert config_from_hf(OLD["qwen2 with windows"]).layer_kinds.count("sliding") == 3
    assert config_from_hf(OLD["qwen25"]).window is None


@pytest.mark.parametrize("name", ["mistral", "qwen3"])
def test_what_a_file_leaves_out_is_filled_in_as_transformers_does(name):
    left_out = {k: v for k, v in OLD[name].items() if k not in ("sliding_window", "head_dim")}
    assert config_from_hf(left_out) == config_from_hf(OLD[name])


@pytest.mark.parametrize("name", ["qwen2 with windows", "qwen3"])
@pytest.mark.parametrize("missing", ["sliding_window", "max_window_layers", "both"])
def test_windows_that_a_qwen_file_leaves_out(name, missing):
    names = ("sliding_window", "max_window_layers") if missing == "both" else (missing,)
    old = {**OLD[name], "use_sliding_window": True, "num_hidden_layers": 36}
    left_out = {k: v for k, v in old.items() if k not in names}
    new = AutoConfig.for_model(old["model_type"], **{k: v for k, v in left_out.items() if k != "model_type"})
    assert config_from_hf(left_out) == config_from_hf(new.to_dict())
    assert "sliding" in config_from_hf(left_out).layer_kinds


@pytest.mark.parametrize(
    ("said", "activation"),
    [
        (dict(hidden_act="gelu", hidden_activation="gelu_pytorch_tanh"), "gelu_tanh"),
        (dict(hidden_act="gelu", hidden_activation=None), "gelu_tanh"),
        (dict(hidden_act="silu"), "silu"),
        (dict(), "gelu_tanh"),
    ],
)
def test_gemma_1_names_its_activation_as_transformers_reads_it(said, activation):
    hf = {k: v for k, v in OLD["gemma"].items() if k not in ("hidden_act", "hidden_activation")}
    assert config_from_hf({**hf, **said}).activation == activation
    tanh = {"gelu_tanh": "gelu_pytorch_tanh"}
    said.pop("hidden_activation", None)  # transformers ignores it
    theirs = AutoConfig.for_model("gemma", **{k: v for k, v in hf.items() if k != "model_type"}, **said)
    assert theirs.hidden_act == tanh.get(activation, activation)


def test_gemma_configs_may_leave_out_what_the_family_implies():
    left_out = {k: v for k, v in OLD["gemma2"].items() if "softcapping" not in k and k not in ("head_dim",)}
    assert config_from_hf(left_out) == config_from_hf(OLD["gemma2"])


@pytest.mark.parametrize(
    ("overrides", "count"),
    [
        ({}, 6_738_415_616),
        (dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40), 13_015_864_320),
        (
            dict(
                hidden_size=8192,
                intermediate_size=28672,
                num_hidden_layers=80,
                num_attention_heads=64,
                num_key_value_heads=8,
            ),
            68_976_648_192,
        ),
    ],
)
def test_parameter_counts_of_llama_2(overrides, count):
    assert parameter_count(config_from_hf({**LLAMA2, **overrides})) == count


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (dict(model_type="gpt2"), "model_type 'gpt2' is not supported"),
        (dict(model_type=None), "model_type None is not supported"),
        (dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "rope type 'yarn'"),
        (dict(rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}), "rope type 'dynamic'"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
        (dict(hidden_act="relu"), "activation 'relu'"),
        (dict(mlp_bias=True), "mlp_bias"),
        (dict(quantization_config={"quant_method": "gptq"}), "quantization_config"),
        (dict(num_key_value_heads=5), "32 attention heads are no multiple of 5"),
        (dict(hidden_size=None), "hidden_size is missing"),
        (dict(vocab_size=None), "vocab_size is missing"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(overrides, message):
    with pytest.raises(InputError, match=message) as caught:
        config_from_hf({**LLAMA2, **overrides})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (dict(use_bidirectional_attention=True), "use_bidirectional_attention"),
        (dict(attn_logit_softcapping=50.0), "attn_logit_softcapping"),
        (dict(layer_types=["full_attention"] * 17 + ["linear_attention"]), "layer_types"),
        (dict(layer_types=["full_attention"]), "layer_types"),
        (dict(rope_parameters={"full_attention": {"rope_type": "default"}}), "no entry for sliding_attention"),
    ],
)
def test_what_gemma_3_does_not_support_is_refused_by_name(overrides, message):
    with pytest.raises(InputError, match=message):
        config_from_hf({**OLD["gemma3"], **overrides})
