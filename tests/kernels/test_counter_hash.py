"""Random bits as a function of a counter."""

from __future__ import annotations

import numpy as np
import pytest

from jora.kernels.counter_hash import combine, fold_all, keep_mask, mix


def murmur(x: int) -> int:
    """fmix32 of MurmurHash3, in Python integers."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)


def test_mix_is_murmurs_finaliser():
    values = np.array([0, 1, 2, 12345, 2**31, 2**32 - 1], np.uint32)
    assert np.asarray(mix(values)).tolist() == [murmur(int(v)) for v in values]


def test_seeds_differ_by_every_number_and_by_order():
    seeds = {int(fold_all(*numbers)) for numbers in [(0, 1, 2), (0, 2, 1), (1, 1, 2), (0, 1), (0, 1, 3)]}
    assert len(seeds) == 5
    assert int(combine(np.uint32(3), 4)) == int(fold_all(3, 4))


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_the_share_kept_is_the_rate_asked_for(rate):
    seeds = np.asarray(fold_all(0, np.arange(16)))
    kept = np.asarray(keep_mask(seeds, (16, 64, 32), rate))
    # Four standard deviations of a share of 32,768 draws.
    assert abs(kept.mean() - (1 - rate)) <= 4 * np.sqrt(rate * (1 - rate) / kept.size)
    assert rate == 0.0 or len({row.tobytes() for row in kept}) == 16


def test_rows_tokens_and_features_are_independent():
    seeds = np.asarray(fold_all(7, np.arange(2)))
    kept = np.asarray(keep_mask(seeds, (2, 256, 256), 0.5)).astype(float) - 0.5
    for other in (kept[::-1], np.roll(kept, 1, axis=1), np.roll(kept, 1, axis=2), kept.swapaxes(1, 2)):
        both = (kept * other).reshape(2, -1)
        assert abs(both.mean()) * 4 < 5 / np.sqrt(both.size)


def test_padding_a_row_or_moving_it_changes_nothing():
    seeds = np.asarray(fold_all(7, np.arange(5)))
    whole = np.asarray(keep_mask(seeds, (5, 40, 3, 4), 0.3))
    assert (np.asarray(keep_mask(seeds[2:3], (1, 9, 3, 4), 0.3)) == whole[2:3, :9]).all()
    assert (np.asarray(keep_mask(seeds, (5, 40, 12), 0.3)) == whole.reshape(5, 40, 12)).all()
