"""The sampling program against transformers' processors, numpy, and jora.generate's own draws."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation import logits_process as oracle

import jora.inference.sampling as base
from jora.errors import InputError
from jora.serve.device import sampling
from jora.serve.device.sample_rows import RowTable, answer_seed, prompt_bits, sample_row, token_counts
from jora.serve.device.sampling import first, new_state, sample, start_row
from jora.serve.requests import SamplingOptions
from jora.sharding import single_device
from jora.sharding.layout import make_layout

VOCAB, ROWS = 99, 4
LAYOUT = single_device()
LOGITS = np.random.default_rng(0).normal(0, 3, (ROWS, VOCAB)).astype(np.float32)
ALL = np.ones(ROWS, bool)
GREEDY = SamplingOptions(temperature=0.0)


def rows_of(*options, seeds=range(ROWS), ends=(), step=0, vocab=VOCAB):
    """The same options for all rows where one is given."""
    several = options * ROWS if len(options) == 1 else options
    table = RowTable(len(several))
    for slot, (one, seed) in enumerate(zip(several, seeds, strict=False)):
        table.put(slot, sample_row(one, seed, ends, vocab))
    return table.at(np.full(len(several), step, np.int32))


def state_of(prompts=((),) * ROWS, answers=((),) * ROWS, layout=LAYOUT, vocab=VOCAB):
    state = new_state(len(prompts), vocab, layout)
    for slot, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        state = start_row(state, slot, prompt_bits(prompt, vocab), token_counts(answer, vocab), layout=layout)
    return state


def adjusted(options, *, prompts=((),) * ROWS, answers=((),) * ROWS, **rows):
    state = state_of(prompts, answers)
    return np.asarray(sampling.adjusted(jnp.asarray(LOGITS), state.counts, state.prompt, rows_of(options, **rows)))


def test_greedy_is_the_largest_and_feeds_the_next_step():
    state, found = sample(LOGITS, state_of(), rows_of(GREEDY), ALL, layout=LAYOUT)
    assert (found.token == LOGITS.argmax(-1)).all() and (state.last == found.token).all()
    assert (found.logprob == 0).all()  # nobody asked


def test_inactive_rows_keep_their_token_and_counts():
    state, _ = sample(LOGITS, state_of(), rows_of(GREEDY), ALL, layout=LAYOUT)
    before = np.asarray(state.last)
    state, found = sample(-LOGITS, state, rows_of(GREEDY), np.array([True, False, True, False]), layout=LAYOUT)
    now = np.where([True, False, True, False], (-LOGITS).argmax(-1), before)
    assert (found.token == now).all() and (state.last == now).all()
    assert state.counts.sum(-1).tolist() == [2, 1, 2, 1]


def test_draws_are_those_of_generate_whatever_shares_the_batch():
    options = SamplingOptions(temperature=0.9, top_k=30, top_p=0.9, min_p=0.01)
    rows = rows_of(options, GREEDY, options, SamplingOptions(presence_penalty=1.0), seeds=(5, 6, 7, 8), step=3)
    _, found = sample(LOGITS, state_of(), rows, ALL, layout=LAYOUT)
    alone = base.sampling_rows(1, 0.9, 30, 0.9, 0.01)
    for slot, seed in ((0, 5), (2, 7)):
        wanted = base.sample(LOGITS[slot : slot + 1], alone._replace(seed=jnp.uint32([seed])), jnp.int32(3))
        assert found.token[slot] == wanted[0]


def test_a_seed_may_have_any_sign():
    seeds = (-(2**63), -3, -1, 0, 3, 2**63 - 1)
    found = [answer_seed(seed, index) for seed in seeds for index in (0, 1)]
    assert len(set(found)) == len(found) and all(0 <= seed < 2**32 for seed in found)
    assert answer_seed(-3, 0) == found[2]


def test_what_is_nothing_in_fp32_is_not_taken_for_nothing():
    smallest = SamplingOptions(temperature=100.0, top_p=5e-324)
    _, found = sample(LOGITS, state_of(), rows_of(smallest), ALL, layout=LAYOUT)
    assert (found.token == LOGITS.argmax(-1)).all()
    prompts = [[5, 6, 7]] * ROWS
    changed = adjusted(SamplingOptions(repetition_penalty=5e-324), prompts=prompts)
    assert np.isfinite(changed).all() and set(changed.argmax(-1)) <= {5, 6, 7}


def test_first_writes_one_row_and_draws_as_the_batch_would():
    options = SamplingOptions(temperature=5.0, frequency_penalty=1.0, repetition_penalty=1.3)
    prompts, answers = [[slot, 7] for slot in range(ROWS)], [[slot + 50] for slot in range(ROWS)]
    _, together = sample(LOGITS, state_of(prompts, answers), rows_of(options), ALL, layout=LAYOUT)
    state = state_of(prompts, answers)
    for slot in (2, 0):
        row = sample_row(options, slot, (), VOCAB)
        state, found = first(LOGITS[slot : slot + 1], state, row, slot, layout=LAYOUT)
        assert found.token[0] == together.token[slot] == state.last[slot]
    assert state.counts.sum(-1).tolist() == [2, 1, 2, 1] and state.last[1] == 0


def test_a_row_starts_with_nothing_of_its_predecessor():
    state = start_row(state_of([[1, 2]] * ROWS, [[3]] * ROWS), 1, prompt_bits([40], VOCAB), layout=LAYOUT)
    assert state.counts.sum(-1).tolist() == [1, 0, 1, 1]
    np.testing.assert_array_equal(state.prompt[1], prompt_bits([40], VOCAB))


@pytest.mark.parametrize("penalty", [1.4, 0.6])
def test_repetition_penalty_is_transformers(penalty):
    prompts, answers = [[1, 2, 31, 32, 98]] * ROWS, [[5, 5, 63 + slot] for slot in range(ROWS)]
    ids = torch.tensor([p + a for p, a in zip(prompts, answers, strict=True)])
    wanted = oracle.RepetitionPenaltyLogitsProcessor(penalty)(ids, torch.tensor(LOGITS)).numpy()
    found = adjusted(SamplingOptions(repetition_penalty=penalty), prompts=prompts, answers=answers)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert not np.allclose(found, LOGITS)


def test_presence_and_frequency_count_the_answer_only():
    wanted = LOGITS.copy()
    for slot in range(ROWS):
        wanted[slot, 5] -= 1.5 + 2 * 0.25
        wanted[slot, 60 + slot] -= 1.5 + 0.25
    options = SamplingOptions(presence_penalty=1.5, frequency_penalty=0.25)
    answers = [[5, 60 + slot, 5] for slot in range(ROWS)]
    np.testing.assert_allclose(adjusted(options, prompts=[[1, 2]] * ROWS, answers=answers), wanted, atol=1e-6)


def test_the_program_counts_what_it_draws():
    state, rows = state_of(), rows_of(SamplingOptions(temperature=0.0, frequency_penalty=2.0))
    tokens, counts = [], np.zeros((ROWS, VOCAB), np.float32)
    for _ in range(6):
        state, found = sample(LOGITS, state, rows, ALL, layout=LAYOUT)
        assert (found.token == (LOGITS - 2.0 * counts).argmax(-1)).all()
        counts[np.arange(ROWS), found.token] += 1
        tokens.append(np.asarray(found.token))
    assert (np.asarray(state.counts) == counts).all()
    assert len({tuple(t) for t in tokens}) > 1


def test_counts_stay_at_their_largest_value():
    state = state_of()
    state = state._replace(counts=state.counts.at[:].set(2**16 - 1))
    state, _ = sample(LOGITS, state, rows_of(GREEDY), ALL, layout=LAYOUT)
    assert (state.counts == 2**16 - 1).all()


@pytest.mark.parametrize(("step", "early"), [(0, True), (3, True), (4, False)])
def test_ends_are_forbidden_before_min_tokens(step, early):
    ends = [int(LOGITS[0].argmax()), 98]
    found = adjusted(SamplingOptions(min_tokens=4), ends=ends, step=step)
    processor = oracle.MinNewTokensLengthLogitsProcessor(0, 4, ends)
    wanted = processor(torch.zeros(ROWS, step, dtype=torch.long), torch.tensor(LOGITS)).numpy()
    np.testing.assert_array_equal(found < -1e19, np.isinf(wanted))
    assert (found[0, ends[0]] < -1e19) == early
    np.testing.assert_array_equal(found[found > -1e19], LOGITS[found > -1e19])


def test_bias_is_added():
    wanted = LOGITS.copy()
    wanted[:, 0] -= 100
    wanted[:, 98] += 7.5
    np.testing.assert_array_equal(adjusted(SamplingOptions(logit_bias={98: 7.5, 0: -100.0})), wanted)
    state, rows = state_of(), rows_of(SamplingOptions(temperature=0.0, logit_bias={17: 100.0}), *[GREEDY] * 3)
    _, found = sample(LOGITS, state, rows, ALL, layout=LAYOUT)
    assert found.token.tolist() == [17, *LOGITS[1:].argmax(-1)]


@pytest.mark.parametrize("temperature", [0.0, 1e4])
def test_only_allowed_tokens_are_drawn(temperature):
    rng, allowed = np.random.default_rng(1), [3, 40, 98]
    mask = np.stack([prompt_bits(allowed, VOCAB)] * 3 + [np.full(4, 2**32 - 1, np.uint32)])
    state, seen = state_of(), set()
    for step in range(30):
        logits = rng.normal(0, 3, (ROWS, VOCAB)).astype(np.float32)
        rows = rows_of(SamplingOptions(temperature=temperature), step=step)
        state, found = sample(logits, state, rows, ALL, mask, layout=LAYOUT)
        seen |= set(found.token[:3].tolist())
        if not temperature:
            assert (found.token[:3] == np.array(allowed)[logits[:3, allowed].argmax(-1)]).all()
            assert found.token[3] == logits[3].argmax()
    assert seen == set(allowed)


def test_a_grammar_that_is_complete_ends_even_before_min_tokens():
    mask = np.stack([prompt_bits([2], VOCAB)] * ROWS)
    for temperature in (0.0, 1.0):
        rows = rows_of(SamplingOptions(temperature=temperature, min_tokens=5, top_p=0.9), ends=[2])
        _, found = sample(LOGITS, state_of(), rows, ALL, mask, layout=LAYOUT)
        assert found.token.tolist() == [2] * ROWS


def test_logprobs_are_of_the_models_own_distribution():
    options = SamplingOptions(temperature=3.0, top_k=5, presence_penalty=2.0, logit_bias={4: 50.0}, logprobs=3)
    _, found = sample(
        LOGITS, state_of(answers=[[1]] * ROWS), rows_of(options, GREEDY, GREEDY, GREEDY), ALL, layout=LAYOUT
    )
    wanted = torch.log_softmax(torch.tensor(LOGITS), -1)
    assert found.token[0] == 4
    own = wanted.gather(1, torch.tensor(np.asarray(found.token))[:, None].long())
    np.testing.assert_allclose(found.logprob, own[:, 0], atol=1e-5)
    assert found.rank.tolist() == (1 + (wanted > own).sum(-1)).tolist()
    top = wanted.topk(20)
    assert (np.asarray(found.top) == top.indices.numpy()).all()
    np.testing.assert_allclose(found.top_logprobs, top.values, atol=1e-5)


def test_free_rows_cost_nothing_to_the_others():
    """What a row asked for is not computed once the row is not active: its logprobs are not there."""
    rows = rows_of(SamplingOptions(logprobs=1), GREEDY, GREEDY, GREEDY)
    _, found = sample(LOGITS, state_of(), rows, np.array([False, True, True, True]), layout=LAYOUT)
    assert (found.logprob == 0).all()


def test_a_row_table_replaces_and_clears_rows():
    table = RowTable(2)
    table.put(0, sample_row(SamplingOptions(temperature=0.7, logit_bias={3: 1.0}), 9, (), VOCAB))
    rows = table.at(np.array([4, 0], np.int32))
    assert rows.sampling.temperature.tolist() == pytest.approx([0.7, 0]) and rows.step.tolist() == [4, 0]
    table.clear(0)
    assert table.at(np.zeros(2, np.int32)).sampling.temperature.tolist() == [0, 0]
    assert rows.bias_ids[0, 0] == 3  # what was handed out does not change


@pytest.mark.parametrize(
    ("options", "ends", "message"),
    [
        (SamplingOptions(logit_bias={VOCAB: 1.0}), (), "no token 99"),
        (SamplingOptions(logit_bias={i: 1.0 for i in range(301)}), (), "at most 300"),
        (SamplingOptions(min_tokens=1), range(33), "at most 32"),
    ],
)
def test_what_does_not_fit_is_refused(options, ends, message):
    with pytest.raises(InputError, match=message):
        sample_row(options, 0, ends, VOCAB)


MIXED = (
    SamplingOptions(temperature=0.8, top_k=40, top_p=0.95, logprobs=5),
    SamplingOptions(temperature=0.0, repetition_penalty=1.2, frequency_penalty=0.5, logit_bias={5: 3.0}),
    SamplingOptions(temperature=1.3, min_p=0.01, min_tokens=9),
    SamplingOptions(temperature=1.0, presence_penalty=1.0),
)


@pytest.mark.parametrize("vocab", [512, pytest.param(99, marks=pytest.mark.slow)])  # cut in two; whole on both devices
def test_a_vocabulary_cut_over_devices_gives_the_same(cpu_devices, vocab):
    cut = make_layout(1, 1, 2, 1, cpu_devices[:2])
    logits = np.random.default_rng(2).normal(0, 3, (ROWS, vocab)).astype(np.float32)
    mask = np.random.default_rng(3).integers(0, 2**32, (ROWS, -(-vocab // 32)), np.uint32)
    results = []
    for layout in (LAYOUT, cut):
        state = state_of([[1, 2]] * ROWS, [[5, 5]] * ROWS, layout, vocab)
        placed = jax.device_put(logits, layout.sharding((None, "vocab"), logits.shape))
        for step in range(2):
            rows = rows_of(*MIXED, ends=[7], step=step, vocab=vocab)
            state, found = sample(placed, state, rows, ALL, mask, layout=layout)
        state, one = first(placed[:1], state, sample_row(MIXED[0], 3, (), vocab), 2, layout=layout)
        results.append(jax.tree.map(np.asarray, (state, found, one)))
        assert state.counts.sharding.is_equivalent_to(layout.sharding((None, "vocab"), logits.shape), 2)
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_only_the_search_for_candidates_collects_a_cut_vocabulary(cpu_devices):
    cut = make_layout(1, 1, 2, 1, cpu_devices[:2])
    logits = jax.device_put(np.zeros((ROWS, 4096), np.float32), cut.sharding((None, "vocab"), (ROWS, 4096)))
    state = new_state(ROWS, 4096, cut)
    text = sample.lower(logits, state, rows_of(GREEDY, vocab=4096), ALL, layout=cut).compile().as_text()
    computations = text.split("\n\n")
    collecting = [c for c in computations if re.search(r"\[4,4096\]\S* (all|collective)-", c)]
    assert collecting and all(re.search("(?i)topk", c) for c in collecting)
    assert "u16[4,2048]" in text


def test_counts_are_updated_in_place():
    state = new_state(ROWS, 2**15, LAYOUT)
    rows = rows_of(GREEDY, vocab=2**15)
    compiled = sample.lower(np.zeros((ROWS, 2**15), np.float32), state, rows, ALL, layout=LAYOUT).compile()
    assert compiled.memory_analysis().alias_size_in_bytes >= state.counts.nbytes
