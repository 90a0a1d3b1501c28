"""Names, shapes and values of GGUF tensors against the model they were written from and against transformers."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from safetensors.numpy import save_file

from jora.errors import InputError
from jora.models.gguf import GGUFSource

FAMILIES = ["llama", "llama3", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3-long"]
WHOLE = slice(None)


def read_all(source: GGUFSource) -> dict[str, np.ndarray]:
    return {name: source.read(name, (WHOLE,) * len(source.shape(name))) for name in source.names()}


def from_transformers(path: Path) -> dict[str, np.ndarray]:
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return {name: value.float().numpy() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_equal_the_model_they_were_written_from(tiny, family):
    model = tiny(family)
    source = GGUFSource(model.path)
    expected = dict(model.state)
    if model.model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    assert source.names() == set(expected)
    for name, value in expected.items():
        found = source.read(name, (WHOLE,) * value.ndim)
        assert source.shape(name) == found.shape == value.shape, name
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, value, rtol=0, atol=2e-7, err_msg=name)


# transformers has no reader for architecture gemma
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma"])
def test_tensors_equal_what_transformers_reads(tiny, family):
    model = tiny(family, kind=Kind.Q8_0)
    expected = from_transformers(model.path)
    for name, value in read_all(GGUFSource(model.path)).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0])
def test_quantised_slices(tiny, kind):
    model = tiny("llama", kind=kind, changes={"intermediate_size": 192})
    expected = from_transformers(model.path)
    source = GGUFSource(model.path)
    for name in ("model.layers.1.self_attn.k_proj.weight", "model.layers.0.mlp.down_proj.weight", "lm_head.weight"):
        rows, columns = source.shape(name)
        for index in [
            (WHOLE, WHOLE),
            (slice(5, 18), WHOLE),
            (WHOLE, slice(columns // 2, columns)),
            (slice(rows - 3, rows), slice(33, 41)),
            (slice(7, 7), WHOLE),
        ]:
            np.testing.assert_array_equal(source.read(name, index), expected[name][index])


@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.Q5_K, Kind.Q6_K])
def test_k_quants(tiny, kind):
    # the gguf package cannot write these: random bits under small scales
    rng = np.random.default_rng(0)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    stored = rng.integers(0, 256, (256, 256 // block, size), dtype=np.uint8)
    at = slice(size - 2, size) if kind is Kind.Q6_K else slice(0, 4)
    scales = rng.uniform(0.001, 0.01, (256, 256 // block, (at.stop - at.start) // 2)).astype(np.float16)
    stored[..., at] = scales.view(np.uint8)
    changes = {"hidden_size": 256, "head_dim": 64, "num_key_value_heads": 4, "num_hidden_layers": 1}
    extra = {"blk.0.attn_q.weight": stored.reshape(256, -1)}
    model = tiny("llama", extra=extra, changes=changes, raw=kind)
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = from_transformers(model.path)[name]
    assert np.isfinite(expected).all() and expected.std() > 0
    np.testing.assert_array_equal(GGUFSource(model.path).read(name, (slice(3, 250), WHOLE)), expected[3:250])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_directory_of_our_tensors_and_config_is_the_same_model(tiny, family, tmp_path):
    # sequences longer than the window, and positions past Llama 3's original length
    model = tiny(family)
    source = GGUFSource(model.path)
    directory = tmp_path / "hf"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(source.hf_config))
    save_file(read_all(source), directory / "model.safetensors", {"format": "pt"})
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(loaded) is type(model.model)
    tokens = torch.randint(0, 320, (2, 13), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(13)[None] + torch.tensor([[0], [9000]])
    with torch.no_grad():
        expected = model.model(tokens, position_ids=positions).logits
        found = loaded(tokens, position_ids=positions).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.std().item())


def test_reading_a_slice_takes_the_slices_memory(tmp_path):
    rows, columns = 8192, 4096
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "llama")
    for name in ("context_length", "embedding_length", "feed_forward_length"):
        getattr(writer, f"add_{name}")(columns)
    writer.add_block_count(1)
    writer.add_head_count(32)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("token_embd.weight", np.zeros((rows, columns // 32 * 34), np.uint8), raw_dtype=Kind.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = GGUFSource(tmp_path / "big.gguf")
    tracemalloc.start()
    part = source.read("model.embed_tokens.weight", (slice(1024, 2048), WHOLE))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert part.nbytes == 1024 * columns * 4
    assert peak < part.nbytes + (8 << 20)


def test_unknown_tensors_are_refused_by_name(tiny):
    extra = np.zeros((64, 64), np.float32)
    with pytest.raises(InputError, match=r"blk\.0\.ffn_gate_inp\.weight"):
        GGUFSource(tiny("llama", extra={"blk.0.ffn_gate_inp.weight": extra}).path)
    with pytest.raises(InputError, match=r"blk\.4\.attn_q\.weight"):
        GGUFSource(tiny("llama", extra={"blk.4.attn_q.weight": extra}).path)
    with pytest.raises(InputError, match=r"no tensor lm_head\.weight"):
        GGUFSource(tiny("gemma").path).read("lm_head.weight", (WHOLE, WHOLE))


def test_only_contiguous_slices(tiny):
    source = GGUFSource(tiny("qwen2").path)
    with pytest.raises(ValueError, match="contiguous"):
        source.read("model.embed_tokens.weight", (slice(0, 10, 2), WHOLE))
