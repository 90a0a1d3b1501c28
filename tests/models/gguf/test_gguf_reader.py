"""The GGUF container against the gguf package's own reader, and damaged files."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from jora.errors import InputError
from jora.models.gguf import GGUFFile


def test_metadata_and_tensors_equal_the_packages_reader(tiny):
    path = tiny("gemma3").path
    file, oracle = GGUFFile(path), gguf.GGUFReader(path)
    expected = {key: field.contents() for key, field in oracle.fields.items() if not key.startswith("GGUF.")}
    assert set(file.metadata) == set(expected)
    for key, value in expected.items():
        found = file.metadata[key]
        if isinstance(found, np.ndarray):
            assert found.tolist() == value
        elif isinstance(found, float):
            assert np.float32(found) == np.float32(value)
        else:
            assert found == value and type(found) is type(value), key
    assert file.metadata["gemma3.attention.layer_norm_rms_epsilon"] == 1e-5  # not 9.99999974e-06
    assert list(file.tensors) == [tensor.name for tensor in oracle.tensors]
    for tensor in oracle.tensors:
        stored = file.tensors[tensor.name]
        assert stored.shape == tuple(reversed(tensor.shape.tolist()))
        assert (stored.kind, stored.offset, stored.nbytes) == (tensor.tensor_type, tensor.data_offset, tensor.n_bytes)


def test_a_file_cut_anywhere_is_one_clear_line(tiny, tmp_path):
    whole = tiny("llama").path.read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [0, 3, 4, 6, 20, 40, 100, 1000, 5000, 12000, len(whole) // 2, len(whole) - 40]:
        cut.write_bytes(whole[:size])
        with pytest.raises(InputError) as raised:
            GGUFFile(cut)
        assert str(cut) in str(raised.value) and "\n" not in str(raised.value), size


def test_what_is_no_gguf_file(tmp_path):
    text = tmp_path / "model.gguf"
    text.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(InputError, match="not a GGUF file"):
        GGUFFile(text)
    with pytest.raises(InputError, match="cannot be read"):
        GGUFFile(tmp_path / "absent.gguf")
    with pytest.raises(InputError, match="cannot be read"):
        GGUFFile(tmp_path)
    text.write_bytes(b"GGUF" + (1).to_bytes(4, "little") + bytes(100))
    with pytest.raises(InputError, match="GGUF version 1"):
        GGUFFile(text)


def test_impossible_counts_end_quickly(tiny, tmp_path):
    whole = bytearray(tiny("llama").path.read_bytes())
    damaged = tmp_path / "damaged.gguf"
    for at in (8, 16, 24):  # tensors, keys, length of the first key
        broken = bytearray(whole)
        broken[at : at + 8] = (1 << 62).to_bytes(8, "little")
        damaged.write_bytes(broken)
        with pytest.raises(InputError, match="damaged"):
            GGUFFile(damaged)


def test_a_part_of_a_split_model_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.add_tensor("token_embd.weight", np.zeros((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="gguf-split --merge"):
        GGUFFile(tmp_path / "m.gguf")


def test_types_that_cannot_be_dequantised_are_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((2, 2), np.int8))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match=r"token_embd\.weight is stored as I8"):
        GGUFFile(tmp_path / "m.gguf")
