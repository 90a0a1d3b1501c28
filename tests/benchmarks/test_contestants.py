"""The contestants compute the same thing: one base, the same adapters, the same greedy tokens."""

from dataclasses import replace
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from benchmarks.serving import peft_runs
from benchmarks.serving.bases import adapter_name, write_adapters, write_base
from benchmarks.serving.engine_runs import _merged_weights
from benchmarks.serving.trace import Workload, synthetic

from jora.methods.storage import load_adapter
from jora.models.model import load_model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / "tiny"
    write_base("tiny", folder)
    return folder


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    write_adapters(base, folder, count=7, ranks=[2, 4], distinct=2)
    return folder


def test_ranks_take_turns_and_what_repeats_is_a_link(adapters):
    files = [adapters / adapter_name(n) / "adapter_model.safetensors" for n in range(7)]
    inodes = [file.stat().st_ino for file in files]
    assert inodes[0] == inodes[4] and inodes[1] == inodes[5] and inodes[2] == inodes[6]
    assert len(set(inodes[:4])) == 4
    assert files[1].stat().st_size > 1.5 * files[0].stat().st_size


def test_merged_weights_are_the_adapted_model(base, adapters):
    model = load_model(base, dtype="float32")
    adapter = load_adapter(adapters / adapter_name(3), model)
    tokens = jnp.arange(20)[None]
    expected = model(tokens, adapter)
    layers = model.params.layers
    weights = jax.jit(_merged_weights)(layers.weights, adapter.state.trained, adapter.state.constant)
    merged = replace(model, params=replace(model.params, layers=replace(layers, weights=weights)))
    np.testing.assert_allclose(merged(tokens), expected, atol=1e-4 * float(expected.std()))


def test_every_adapter_gives_other_tokens_so_that_agreement_means_something(base, adapters):
    model = load_model(base, dtype="float32")
    tokens = jnp.arange(3, 103).reshape(4, 25)
    states = [None, *(load_adapter(adapters / adapter_name(n), model) for n in range(4))]
    greedy = [np.asarray(model(tokens, state).argmax(-1)) for state in states]
    for one, other in combinations(greedy, 2):
        assert (one != other).mean() > 0.5


@pytest.mark.slow
def test_peft_serves_every_request_whole_with_its_own_adapter(base, adapters):
    model = load_model(base, dtype="float32")
    load = Workload(requests=6, rate=1000.0, inputs=(2, 9), outputs=(1, 5))
    trace = synthetic(load, 3, model.config.vocab_size)
    served = {one.number: one for one in peft_runs.play(peft_runs.open_peft(str(base), str(adapters), 3), trace, 4, 60)}
    assert len(served) == len(trace)
    for arrival in trace:
        one = served[arrival.number]
        assert len(one.times) == len(one.tokens) == arrival.output
        assert one.times[0] >= arrival.time and list(one.times) == sorted(one.times)
        adapter = load_adapter(adapters / adapter_name(arrival.adapter), model)
        logits = model(jnp.asarray([[*arrival.prompt, *one.tokens[:-1]]]), adapter)[0]
        assert logits[len(arrival.prompt) - 1 :].argmax(-1).tolist() == list(one.tokens)
