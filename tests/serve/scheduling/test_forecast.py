"""The forecast of pages against simulations, position by position."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.serve.scheduling.simulation import pool_layout

from jora.serve.requests import Request
from jora.serve.scheduling.forecast import Footprint, Forecast
from jora.serve.scheduling.sequence import Sequence

P = 4
WINDOWS = [(None,), (None, None, 6), (5, 12, None), (7,), (8, 1)]


def running(prompt, max_tokens, decoded):
    sequence = Sequence(Request("r", (1,) * prompt), 0, None, max_tokens)
    sequence.state, sequence.computed = "running", prompt + decoded
    return sequence


def held(layout, position):
    """Pages while a query at this position runs."""
    return sum(position // P + 1 - layout.first_block(g, position) for g in range(len(layout.groups)))


sequences = st.lists(
    st.tuples(st.integers(1, 20), st.integers(1, 30), st.integers(0, 29)).map(lambda t: (*t[:2], min(t[2], t[1] - 1))),
    max_size=6,
)


@settings(max_examples=200, deadline=None)
@given(windows=st.sampled_from(WINDOWS), batch=sequences)
def test_the_peak_of_decoding_sequences_is_the_simulated_one(windows, batch):
    layout = pool_layout(windows, P)
    decoding = [running(*numbers) for numbers in batch]
    peaks = [0]
    for step in range(1, 70):
        # Until the step after its last token: the host learns of an end a step late.
        still = [s for s in decoding if s.computed + step <= s.limit + 1]
        peaks.append(sum(held(layout, s.computed + step - 1) for s in still))
    forecast = Forecast(Footprint(layout, 8), decoding, [], 0).peak
    sliding = sum(window is not None for window in windows)
    # A sliding group holds a block less in one position of a page; all at that point at once is not counted on.
    assert max(peaks) <= forecast <= max(peaks) + sliding * len(batch)
    if not sliding:
        assert forecast == max(peaks)


@settings(max_examples=200, deadline=None)
@given(
    windows=st.sampled_from(WINDOWS),
    batch=sequences,
    prompts=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20)), min_size=1, max_size=4),
    chunk=st.sampled_from([4, 8, 16]),
    order=st.randoms(use_true_random=False),
)
def test_no_order_of_chunks_exceeds_the_peak(windows, batch, prompts, chunk, order):
    layout = pool_layout(windows, P)
    decoding = [running(*numbers) for numbers in batch]
    prefilling = [Sequence(Request("r", (1,) * length), 0, None, most) for length, most in prompts]
    forecast = Forecast(Footprint(layout, chunk), decoding, prefilling, 0)
    last = forecast.peak
    decoding, prefilling = list(decoding), list(prefilling)
    seen = 0
    while decoding or prefilling:
        served = order.choice(prefilling) if prefilling and order.random() < 0.8 else None
        pages = sum(held(layout, s.computed) for s in decoding)
        for sequence in prefilling:
            end = min(sequence.computed + chunk, sequence.length) if sequence is served else sequence.computed
            pages += sum(
                max(0, layout.blocks(end) - layout.first_block(g, sequence.computed)) for g in range(len(windows))
            )
        seen = max(seen, pages)
        assert pages <= last
        decoding = [s for s in decoding if s.computed <= s.limit]
        for sequence in decoding:
            sequence.computed += 1
        if served is not None:
            served.computed = min(served.computed + chunk, served.length)
            if served.computed == served.length:
                prefilling.remove(served)
                decoding.append(served)
        decoding = [s for s in decoding if s.computed <= s.limit]
        now = Forecast(Footprint(layout, chunk), decoding, prefilling, 0).peak
        assert now <= last, "a step made the peak rise"
        last = now


def test_who_ends_soon_makes_room_for_who_grows_later():
    layout = pool_layout((None,), P)
    ending, new = running(40, 3, 1), Sequence(Request("r", (1,) * 4), 0, None, 60)
    forecast = Forecast(Footprint(layout, 8), [ending], [], 0)
    # The new one reaches its 16 blocks long after the other's 11 are free: 11 + 2 or 16, not 11 + 16.
    assert forecast.peak == 11
    assert forecast.peak_with(new) == 16
    forecast.add(new)
    assert forecast.peak == 16


@pytest.mark.parametrize("windows", WINDOWS)
def test_footprints_are_reached_and_rise(windows):
    layout, footprint = pool_layout(windows, P), Footprint(pool_layout(windows, P), 8)
    positions = np.arange(1, 80)
    pages = footprint.decoding(positions)
    assert (np.diff(pages) >= 0).all() and (footprint.prefilling(positions) >= pages).all()
    simulated = [held(layout, p - 1) for p in positions]
    sliding = sum(window is not None for window in windows)
    assert all(
        s <= f <= max(simulated[: i + 1]) + sliding for i, (s, f) in enumerate(zip(simulated, pages, strict=True))
    )
    assert pages[-1] - max(simulated) <= max(0, sliding - 1)
