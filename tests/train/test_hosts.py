"""Two processes that train over one mesh give what one process gives; where they meet is read from text."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tests.tiny import tiny
from tests.train.conftest import examples, options

from jora.cli import main
from jora.data.batches import Tokenised
from jora.errors import InputError
from jora.methods.full import Full
from jora.methods.lopa import IDPG, LoPA
from jora.methods.lora import LoRA
from jora.methods.registry import method_class
from jora.methods.storage import save_adapter
from jora.models.model import load_model
from jora.sharding import MeshSpec
from jora.sharding.hosts import Hosts, parse_hosts, start_hosts
from jora.train import train
from jora.train.api import _check_hosts

ROOT = Path(__file__).resolve().parents[2]
MESH = "fsdp=2,tensor=2"


def test_where_hosts_meet() -> None:
    assert parse_hosts("auto") == Hosts()
    assert parse_hosts("10.0.0.1:8476,1,2") == Hosts("10.0.0.1:8476", 1, 2)
    for text in ("10.0.0.1:8476", "10.0.0.1,0,2", "a:1,x,2", "a:1,0", "a:b,0,2"):
        with pytest.raises(InputError, match=r"write auto, or HOST:PORT,INDEX,COUNT"):
            parse_hosts(text)
    with pytest.raises(InputError, match="of 2 hosts it is at most 1"):
        parse_hosts("a:1,2,2")


def test_the_command_reads_them_before_anything_else(tmp_path: Path) -> None:
    words = ["train", "--model", "none", "--data", "none.jsonl", "--out", str(tmp_path / "out"), "--hosts", "nowhere"]
    with pytest.raises(InputError, match="hosts 'nowhere': write auto"):
        main.run(words)


def test_a_mesh_that_hosts_do_not_divide() -> None:
    with pytest.raises(InputError, match="its 4 devices cannot be shared by 3 hosts"):
        start_hosts(Hosts("127.0.0.1:1", 0, 3), MeshSpec(fsdp=2, tensor=2))


def test_a_first_host_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jora.sharding.hosts.PATIENCE", 0.3)
    devices = jax.config.jax_num_cpu_devices
    try:
        with pytest.raises(
            InputError, match=r"nobody answers at 127\.0\.0\.1:\d+ \(Connection refused\): start the same"
        ):
            start_hosts(Hosts(address(), 1, 2), MeshSpec(fsdp=2 * devices))
    finally:
        jax.config.update("jax_num_cpu_devices", devices)


@pytest.mark.parametrize("method", [LoPA(), IDPG()], ids=lambda method: method.name)
def test_methods_that_need_one_process(method: Any) -> None:
    model = load_model(tiny("llama2")[1], dtype="float32")
    with pytest.raises(InputError, match=f"method {method.name} over several hosts"):
        _check_hosts(method.init(model, jax.random.key(0)), model)


def test_no_cluster_says_how_they_meet() -> None:
    """In a process of its own: one that has used jax could not meet anybody."""
    script = """
from jora.errors import InputError
from jora.sharding import MeshSpec
from jora.sharding.hosts import Hosts, start_hosts
try:
    start_hosts(Hosts(), MeshSpec())
except InputError as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=environment)
    assert done.stdout.startswith("the hosts cannot meet (") and "coordinator" in done.stdout, done.stderr[-2000:]


def address() -> str:
    """Where two processes can meet: a port that was free a moment ago."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{found.getsockname()[1]}"


def together(commands: list[list[str]]) -> list[str]:
    """What each of the commands printed; they run at once, and none may fail."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    running = [
        subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        for command in commands
    ]
    outputs = [process.communicate(timeout=240) for process in running]
    for process, (_, errors) in zip(running, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [printed for printed, _ in outputs]


def test_they_agree_on_numbers_of_64_bits() -> None:
    """As bytes of memory are: in 32 bits 80 GiB would be 0 and some amounts negative."""
    script = """
import sys
from jora.sharding import MeshSpec, hosts
hosts.start_hosts(hosts.parse_hosts(sys.argv[1]), MeshSpec(fsdp=2))
index = int(sys.argv[1].split(",")[1])
print(hosts.least((80 << 30) - index), hosts.least(-(80 << 30) + index), hosts.any_of(index == 1), hosts.any_of(False))
"""
    meet = address()
    printed = together([["-c", script, f"{meet},{index},2"] for index in range(2)])
    assert all(text.endswith(f"{(80 << 30) - 1} {-(80 << 30)} True False\n") for text in printed), printed


def run(directory: Path, **task: Any) -> list[str]:
    """What each of two processes printed; they share MESH. `interrupt`: a step at which the second is told to stop."""
    meet, commands = address(), []
    for index in range(2):
        own = {**task, "hosts": f"{meet},{index},2", "mesh": MESH}
        own["interrupt"] = task["interrupt"] if index == 1 else None
        path = directory / f"task-{index}.json"
        path.write_text(json.dumps(own))
        commands.append([str(ROOT / "tests/train/host_worker.py"), str(path)])
    return together(commands)


def listed(examples: list[Tokenised]) -> list[Any]:
    return [[example.tokens.tolist(), example.loss.tolist()] for example in examples]


def adapter(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5 * np.abs(value).max(), err_msg=name)


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line.get("loss", line.get("eval_loss")) for line in lines]


@pytest.mark.slow
def test_two_hosts_train_what_one_does(tmp_path: Path) -> None:
    """From an adapter's directory, with evaluations and dropout; Ctrl-C on one host ends both, and both go on."""
    path = str(tiny("llama2")[1])
    model = load_model(path, dtype="float32", mesh=MESH)
    begin, one, two, resumed = (tmp_path / name for name in ("begin", "one", "two", "resumed"))
    save_adapter(LoRA(rank=4, dropout=0.1, targets="all-linear").init(model, jax.random.key(0)), begin)
    chosen, data, held_out = options(max_steps=8, eval_every=4, save_every=100), examples(10), examples(4, seed=7)
    train(model, begin, data, out=one, options=chosen, eval_data=held_out)
    task: dict[str, Any] = {"model": path, "interrupt": None}
    task |= {"data": listed(data), "eval_data": listed(held_out), "options": dataclasses.asdict(chosen)}
    run(tmp_path, **task, runs=[(str(two), None, str(begin))])
    assert sorted(p.name for p in two.iterdir()) == sorted(p.name for p in one.iterdir())
    ours, theirs = adapter(two), adapter(one)
    assert_close(ours, theirs)
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-5)
    assert len(losses(two)) == 10

    again = [(str(resumed), None, str(begin))]
    printed = run(tmp_path, **task | {"interrupt": 2}, runs=again)
    assert all("interrupted" in text for text in printed)
    assert not (resumed / "adapter").exists()
    assert [path.name for path in (resumed / "checkpoints").iterdir()] == ["step-00000004"]
    task["options"]["resume"] = True
    run(tmp_path, **task, runs=again)
    assert losses(resumed) == losses(two)
    for name, value in adapter(resumed).items():
        np.testing.assert_array_equal(value, ours[name], err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "galore"])
def test_two_hosts_train_a_model(optimizer: Any, tmp_path: Path) -> None:
    """The model's own weights, of which each host has a part: it is written whole, as one process writes it."""
    path, one, two = str(tiny("qwen25")[1]), tmp_path / "one", tmp_path / "two"
    chosen = options(
        max_steps=3, learning_rate=1e-3, optimizer=optimizer, galore_rank=8, layerwise=optimizer != "adamw"
    )
    train(load_model(path, dtype="float32", mesh=MESH), Full(), examples(6), out=one, options=chosen)
    task: dict[str, Any] = {"model": path, "interrupt": None, "eval_data": None}
    task |= {"data": listed(examples(6)), "options": dataclasses.asdict(chosen)}
    run(tmp_path, **task, runs=[(str(two), "full", {})])
    assert sorted(p.name for p in (two / "model").iterdir()) == sorted(p.name for p in (one / "model").iterdir())
    ours, theirs, before = (load_file(p / "model.safetensors") for p in (two / "model", one / "model", Path(path)))
    assert_close(ours, theirs)
    assert sum(np.abs(value - before[name]).max() > 1e-4 for name, value in ours.items()) > 0.9 * len(before)
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-5)


METHODS: dict[str, dict[str, Any]] = {  # what each does with a base of which a host has a part
    "dora": dict(rank=3),  # takes norms of its weights in every step
    "pissa": dict(rank=2),  # decomposes its weights
    "nola": dict(rank=4, bases=8),  # draws each shard of its bases
    "flora": dict(rank=1),  # scales its products
    "prompt-tuning": dict(prompt_tokens=3),  # begins with some of its embeddings
    "lora": dict(rank=2, modules_to_save=["norm"], trainable_token_indices=[3, 4]),  # trains copies of its weights
}


@pytest.mark.slow
def test_two_hosts_train_every_method(tmp_path: Path) -> None:
    path, one, two = str(tiny("llama2")[1]), tmp_path / "one", tmp_path / "two"
    # Of a gradient that is next to nothing AdamW takes the sign, which rounding may turn: not so with this epsilon.
    chosen = options(max_steps=2, learning_rate=1e-2, epsilon=1e-4)
    task: dict[str, Any] = {"model": path, "interrupt": None, "eval_data": None}
    task |= {"data": listed(examples(6)), "options": dataclasses.asdict(chosen)}
    run(tmp_path, **task, runs=[(str(two / name), name, given) for name, given in METHODS.items()])
    for name, given in METHODS.items():
        model = load_model(path, dtype="float32", mesh=MESH)
        train(model, method_class(name)(**given), examples(6), out=one / name, options=chosen)
        assert_close(adapter(two / name), adapter(one / name))
