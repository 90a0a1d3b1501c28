"""The code books of bitsandbytes: NF4's 16 values, and the 256 of its signed dynamic type for the scales."""

from __future__ import annotations

from functools import cache

import numpy as np

# Quantiles of the standard normal distribution, scaled to [-1, 1] (QLoRA, arXiv 2305.14314, appendix E),
# in the digits that bitsandbytes has.
NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)


@cache
def dynamic() -> np.ndarray:
    """The signed dynamic tree type (arXiv 1511.04561) of 8 bits: ascending, fp32 [256].

    Seven decades below 1, from 10^-6 on, with 1, 2, 4 ... 64 evenly spaced values each; 0 and 1.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = _even(2**decade + 1)
        means = (edges[:-1] + edges[1:]) / np.float32(2)
        scaled = np.float32(10.0 ** (decade - 6)) * means
        values += [*scaled.tolist(), *(-scaled).tolist()]
    return np.sort(np.array(values, np.float32))


def _even(count: int) -> np.ndarray:
    """`count` evenly spaced numbers from 0.1 to 1, rounded to fp32 as torch.linspace does: from both ends."""
    first, last = np.float32(0.1), np.float32(1)
    step = np.float64((last - first) / np.float32(count - 1))
    numbers = np.arange(count)
    rising, falling = first + step * numbers, last - step * numbers[::-1]
    return np.where(numbers < count // 2, rising, falling).astype(np.float32)


def midpoints(code: np.ndarray) -> np.ndarray:
    """What lies between two neighbours of a code book: a value equal to one belongs to the lower neighbour."""
    return (code[:-1] + code[1:]) / np.float32(2)
