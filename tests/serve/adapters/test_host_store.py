"""The host cache: one load for all who wait, errors for all of them, bytes bounded, least recently used first out."""

from __future__ import annotations

import gc
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tests.serve.adapters.shelf import LIMITS, Slow, base, pool_layout, save, shelf

import jora
from jora.errors import InputError
from jora.methods.method import Method
from jora.methods.served import LowRank
from jora.serve.adapters import loading
from jora.serve.adapters.catalogue import Catalogue
from jora.serve.adapters.host_store import MAX_LOADING, REMEMBERED, WANTED, HostStore
from jora.serve.adapters.loading import Loader
from jora.serve.adapters.packing import pack
from jora.serve.scheduling.sequence import AdapterVersion


def version(name: str, number: int = 1) -> AdapterVersion:
    return AdapterVersion(name, number)


def settled(store: HostStore, wanted: AdapterVersion) -> str:
    """Its status, once it is no longer loading."""
    until = time.monotonic() + 20
    while (status := store.status(wanted)) == "loading" and time.monotonic() < until:
        time.sleep(0.002)
    return status


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_requests_for_one_adapter_load_it_once() -> None:
    gate = threading.Event()
    source = Slow(gate=lambda loaded: gate.wait(20))
    store = HostStore(source, 10_000)
    for _ in range(50):
        store.request(version("a"))
    waiting = [threading.Thread(target=store.fetch, args=(version("a"),)) for _ in range(8)]
    for thread in waiting:
        thread.start()
    assert store.status(version("a")) == "loading"
    gate.set()
    for thread in waiting:
        thread.join()
    assert settled(store, version("a")) == "host"
    assert source.loads == [version("a")] and store.counts.loads == 1
    store.close()


def test_others_load_while_one_is_slow() -> None:
    gate = threading.Event()
    source = Slow(gate=lambda loaded: gate.wait(20) if loaded.name == "slow" else None)
    store = HostStore(source, 10_000)
    store.request(version("slow"))
    while not source.loads:
        time.sleep(0.001)
    store.request(version("quick"))
    assert settled(store, version("quick")) == "host"
    assert store.status(version("slow")) == "loading"
    gate.set()
    store.close()


@pytest.mark.parametrize("error", [InputError("it is bad"), RuntimeError("nobody foresaw it is bad")])
def test_an_error_reaches_all_who_wait_and_is_told_for_a_while(error: Exception) -> None:
    source, clock = Slow(), Clock()
    source.error = error
    store = HostStore(source, 10_000, clock)
    store.request(version("a"))
    assert settled(store, version("a")) == "failed"
    told = store.failure(version("a"))
    assert isinstance(told, InputError) and "it is bad" in str(told)
    store.request(version("a"))
    assert len(source.loads) == 1  # not tried again at once
    with pytest.raises(InputError, match="it is bad"):
        store.fetch(version("a"))  # who asks for it by hand does try
    clock.now += REMEMBERED
    source.error = None
    store.request(version("a"))
    assert settled(store, version("a")) == "host"
    store.close()


def test_the_least_recently_used_goes_first_and_bytes_stay_bounded() -> None:
    clock = Clock()
    store = HostStore(Slow(), 3000, clock)
    for name in "abc":
        store.fetch(version(name))
        clock.now += WANTED
    assert store.nbytes == 3000
    store.status(version("a"))  # used again
    store.fetch(version("d"))
    assert store.nbytes == 3000
    assert [store.status(version(name)) for name in "abcd"] == ["host", "absent", "host", "host"]
    store.close()


def test_what_somebody_waits_for_goes_last_and_holds_up_new_loads() -> None:
    clock = Clock()
    source = Slow()
    store = HostStore(source, 3000, clock)
    for name in "abc":
        store.fetch(version(name))
    store.take(version("c"))
    store.request(version("d"))  # a and b wait to be taken: more than half of the memory
    assert store.status(version("d")) == "absent"
    store.take(version("a"))
    store.request(version("d"))
    assert settled(store, version("d")) == "host"
    assert store.status(version("b")) == "host" and store.nbytes <= 3000
    clock.now += WANTED  # nobody asks any more
    store.request(version("e"))
    assert settled(store, version("e")) == "host" and store.nbytes <= 3000
    store.close()


def test_an_adapter_above_the_bound_is_refused() -> None:
    store = HostStore(Slow(2000), 1000)
    with pytest.raises(InputError, match="host_adapters_bytes"):
        store.fetch(version("a"))
    assert store.nbytes == 0
    store.close()


def test_a_version_dropped_while_it_loads_leaves_nothing() -> None:
    gate = threading.Event()
    store = HostStore(Slow(gate=lambda loaded: gate.wait(20)), 10_000)
    store.request(version("a"))
    store.drop(version("a"))
    gate.set()
    assert settled(store, version("a")) == "absent"
    assert store.nbytes == 0 and len(store) == 0
    store.close()


METHODS: dict[str, Callable[[], Method]] = {
    "lora": lambda: jora.LoRA(rank=3, targets=["q_proj", "up_proj"], rank_pattern={"layers.0.self_attn.q_proj": 5}),
    "dora": lambda: jora.DoRA(rank=2, targets=["q_proj", "down_proj"]),
    "flora": lambda: jora.FLoRA(rank=2),
    "ia3": lambda: jora.IA3(),
    "vera": lambda: jora.VeRA(rank=6, targets=["q_proj", "up_proj"]),
    "nola": lambda: jora.NOLA(rank=4, bases=8, bits=8, targets=["q_proj", "gate_proj"]),
    "per-head": lambda: jora.PerHeadLoRA(rank=2),
    "prompt": lambda: jora.PromptTuning(prompt_tokens=5),
}


QUICK = ("lora", "ia3", "prompt")  # the others compile programs


@pytest.mark.parametrize(
    "method", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_what_is_loaded_is_what_was_saved_in_pages(method: str, tmp_path: Path) -> None:
    model = base(None if method in QUICK else "tensor=2")
    save(tmp_path / "x", METHODS[method]())
    catalogue, pool = Catalogue(tmp_path, model.config, model.identity), pool_layout(model)
    loader = Loader(catalogue, model, pool, LIMITS)
    named = catalogue.resolve("x")
    loaded = loader.expand(loader.load(named), named)
    assert loaded.spec == loader.described(named).spec  # known before the weights are read
    assert loaded.blocks is not None and loaded.pages == len(loaded.blocks) == loader.pages(loaded.spec)
    adapter = jora.load_adapter(tmp_path / "x", base())
    served = adapter.method.lower(adapter, base())
    expected = pack(served, model.config, model.layout, pool.dtype)
    stream = loaded.blocks.swapaxes(0, 1).reshape(pool.shards, -1)
    np.testing.assert_allclose(stream[:, : expected.shape[1]], expected, rtol=1e-5, atol=1e-6)
    assert not stream[:, expected.shape[1] :].any()
    assert loaded.served.prefix_slots == served.prefix_slots
    assert (loaded.served.prefix is None) == (served.prefix is None)
    if served.prefix is not None:
        np.testing.assert_array_equal(loaded.prefix(None), adapter.state.trained["prompt"])


def test_nola_stays_compact_and_its_pages_go_once_taken(tmp_path: Path) -> None:
    save(tmp_path / "n", jora.NOLA(rank=4, bases=8, targets=["q_proj"]))
    with shelf(tmp_path) as parts:
        named = parts.catalogue.resolve("n")
        whole = parts.host.fetch(named)
        assert whole.blocks is not None
        compact_bytes = parts.host.nbytes - whole.blocks.nbytes
        taken = parts.host.take(named)
        assert taken is not None and taken.blocks is not None
        assert parts.host.nbytes == compact_bytes < whole.blocks.nbytes
        assert parts.host.status(named) == "absent"  # its pages have to be made again
        shutil.rmtree(tmp_path / "n")  # not from disk
        again = parts.host.fetch(named)
        assert again.blocks is not None
        np.testing.assert_array_equal(again.blocks, taken.blocks)


def test_files_that_change_under_a_version_are_not_read_as_it(tmp_path: Path) -> None:
    save(tmp_path / "x")
    with shelf(tmp_path) as parts:
        old = parts.catalogue.resolve("x")
        save(tmp_path / "x", seed=1)
        with pytest.raises(InputError, match="changed"):
            parts.host.fetch(old)
        assert parts.host.fetch(parts.catalogue.resolve("x")).pages > 0


def test_nothing_of_a_load_stays_on_a_device(tmp_path: Path) -> None:
    save(tmp_path / "x")
    with shelf(tmp_path) as parts:
        parts.host.fetch(parts.catalogue.resolve("x"))
        save(tmp_path / "x", seed=1)
        gc.collect()  # what earlier tests have left would go in between
        before = len(jax.live_arrays())
        parts.host.fetch(parts.catalogue.resolve("x"))
        gc.collect()
        assert len(jax.live_arrays()) <= before


def test_lowered_factors_are_those_of_the_file(tmp_path: Path) -> None:
    """Against numpy and the file's own tensors: x A^T B^T scaled."""
    from safetensors.numpy import load_file

    save(tmp_path / "x", jora.LoRA(rank=2, alpha=6, targets=["up_proj"]))
    files = load_file(tmp_path / "x" / "adapter_model.safetensors")
    with shelf(tmp_path) as parts:
        loaded = parts.host.fetch(parts.catalogue.resolve("x"))
    assert loaded.blocks is not None
    config, stream = base().config, loaded.blocks.reshape(-1)
    sizes = [(config.layers, 2, config.embed), (config.layers, 2, config.mlp)]
    a = stream[: int(np.prod(sizes[0]))].reshape(sizes[0])
    b = stream[a.size : a.size + int(np.prod(sizes[1]))].reshape(sizes[1])
    pair = LowRank(a, b)
    for layer in range(config.layers):
        name = f"base_model.model.model.layers.{layer}.mlp.up_proj.lora_{{}}.weight"
        expected = 3.0 * files[name.format("B")] @ files[name.format("A")]
        np.testing.assert_allclose(pair.b[layer].T @ pair.a[layer], expected, rtol=1e-5, atol=1e-6)


def test_few_loads_are_under_way_at_a_time() -> None:
    gate = threading.Event()
    store = HostStore(Slow(gate=lambda loaded: gate.wait(20)), 1 << 20)
    names = [version(str(number)) for number in range(3 * MAX_LOADING)]
    for name in names:
        store.request(name)
    found = [store.status(name) for name in names]
    gate.set()
    store.close()
    assert found.count("loading") == MAX_LOADING and found.count("absent") == 2 * MAX_LOADING


def test_files_that_change_while_they_are_read_are_not_read_as_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "x")
    read = loading.load_adapter

    def replaced(path: Path, model: Any) -> Any:
        adapter = read(path, model)
        save(tmp_path / "x", seed=1)
        return adapter

    monkeypatch.setattr(loading, "load_adapter", replaced)
    with shelf(tmp_path) as parts, pytest.raises(InputError, match="changed"):
        parts.host.fetch(parts.catalogue.resolve("x"))
