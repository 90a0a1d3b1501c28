"""int8 against bitsandbytes' LLM.int8; what it shares with nf4 (meshes, files, bits) is tested beside that."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch

from jora.errors import InputError
from jora.quant.int8 import Int8Tensor


def test_codes_and_values_are_bitsandbytes() -> None:
    w = np.random.default_rng(0).standard_normal((33, 70)).astype(np.float32)
    ours = Int8Tensor.quantise(w.shape, lambda start, stop: w[start:stop], 200)
    codes, absmax, _ = bnb.int8_vectorwise_quant(torch.from_numpy(w))
    np.testing.assert_array_equal(ours.codes, codes.numpy())
    np.testing.assert_array_equal(ours.absmax, absmax.numpy())
    dense = bnb.int8_vectorwise_dequant(codes, absmax).numpy()
    np.testing.assert_allclose(ours.dense(0, 33), dense, rtol=3e-7)
    np.testing.assert_array_equal(ours.dense(5, 9), ours.dense(0, 33)[5:9])
    assert np.all(np.abs(dense - w) <= absmax.numpy()[:, None] / 254 * (1 + 1e-5))


def test_a_file_of_another_form_is_refused() -> None:
    stored = Int8Tensor(np.ones((4, 3), np.int8), np.ones(4, np.float32)).stored("a.weight", "float32")
    assert set(stored) == {"a.weight", "a.SCB", "a.weight_format"}
    np.testing.assert_array_equal(Int8Tensor.load("a.weight", stored.__getitem__).codes, stored["a.weight"])
    with pytest.raises(InputError, match=r"a\.weight: is not int8"):
        Int8Tensor.load("a.weight", {**stored, "a.weight": np.ones((4, 3), np.float16)}.__getitem__)
