"""The GPU scripts' arithmetic and tables, against numbers worked out by hand; what runs there runs here when tiny."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """Imports a script as it is run: with its own folder on the path."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def test_flops_of_a_lora_step_at_7b_by_hand(script):
    shapes = script("gpu_shapes")
    found = shapes.lora_flops(shapes.llama(False), tokens=512, answers=64, rank=16)
    # 32 layers of four 4096 x 4096 and three 4096 x 11008, 2 FLOPs a weight and token, forward and backward.
    assert found["linears"] == 4 * 512 * 32 * (4 * 4096**2 + 3 * 4096 * 11008) == 13_262_859_010_048
    # Two products forward and four backward, 2 x 128 FLOPs each for 512 * 513 / 2 pairs of 32 heads in 32 layers.
    assert found["attention"] == 6 * 2 * 128 * (512 * 513 // 2) * 32 * 32
    assert found["logits"] == 2 * 2 * 64 * 32_000 * 4096
    assert found["lora"] == 6 * 512 * 32 * 16 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    assert found["total"] == sum(found[part] for part in ("linears", "attention", "logits", "lora"))


def test_weights_are_normal_without_more_memory_than_they_take(script):
    import jax.numpy as jnp

    from jora.models.families import config_from_hf
    from jora.sharding import single_device

    shapes = script("gpu_shapes")
    weights = shapes.random_weights(config_from_hf(shapes.llama(True)), single_device(), jnp.float32)
    entries = np.asarray(weights.layers.weights["up_proj"]).ravel()
    assert entries.std() == pytest.approx(0.02, rel=0.02) and abs(entries.mean()) < 1e-3
    assert np.mean(np.abs(entries) < 0.02) == pytest.approx(0.683, abs=0.01)
    assert np.all(np.asarray(weights.layers.norms["input"]) == 1)
    assert not np.allclose(weights.embed, weights.head)


def test_every_other_step_refreshes_one_matrix(script):
    due = script("gpu_galore7b").matrices_due
    assert [due(step, every=448, matrices=224) for step in range(6)] == [224, 0, 1, 0, 1, 0]
    assert sum(due(step, every=448, matrices=224) for step in range(1, 449)) == 224
    assert min(due(step, every=200, matrices=224) for step in range(1, 201)) == 1


def test_due_matrices_are_those_of_the_library(script):
    import jax.numpy as jnp
    import optax

    from jora.optim.galore import GaLore

    due = script("gpu_galore7b").matrices_due
    names = list("abcdefg")
    galore = GaLore(optax.identity(), rank=1, refresh_every=28, layers=2)
    for step in range(30):
        states = [galore.init({})._replace(step=jnp.int32(step), number=jnp.int32(layer)) for layer in range(2)]
        flags = [bool(flag) for state in states for flag in galore._due(state, names).values()]
        assert sum(flags) == due(step, every=28, matrices=14)


def test_the_table_compares_with_the_floor_and_keeps_failures(script):
    lora = script("gpu_llama7b")
    run = {"name": "jora:none", "length": 512, "seconds": [0.1, 0.2, 0.3], "peak_bytes": 3 << 29}
    run = lora.with_floor({**run, "first_step_seconds": 30.0, "first_of_process": True}, False, 1e15)
    lines = lora.table([run, {"name": "peft", "length": 512, "error": "out of memory"}]).splitlines()
    least = run["flops"]["total"] / 1e15
    assert f"| 2,560 | 200.00 (100.00 - 300.00) | {1e3 * least:.2f} | {0.2 / least:.2f} | 1.50 | 30.0 |" in lines[2]
    assert "peft | failed: out of memory" in lines[3]


def test_the_galore_table_says_whose_the_peak_is(script):
    when = {"factorised, compiled": 1, "weights": 2, "optimiser state": 21, "first step": 23, "last step": 23.5}
    peaks = [{"when": name, "peak_bytes": int(gb * 1e9)} for name, gb in when.items()]
    steps = [{"seconds": s, "refreshed": r, "loss": x} for s, r, x in ((9, 224, 11.0), (0.5, 0, 10.5), (2, 1, 10.0))]
    run = {"name": "galore-int8", "memory": peaks, "steps": steps, "analysis": {"total": 22.5e9}}
    table = script("gpu_galore7b").table
    last = table([run]).splitlines()[-1]
    assert "23.50 (21.89) | yes | the steps' | 22.50 | 500.00" in last and "2000.00 (2000.00 - 2000.00)" in last
    assert "| 11.0000, 10.0000 | yes |" in last
    peaks[2]["peak_bytes"] = peaks[-1]["peak_bytes"] = int(25e9)
    assert "| no | the making of the state |" in table([run])


def test_a_hung_child_is_stopped_and_its_results_stay(script, tmp_path):
    children = script("gpu_children")
    code = tmp_path / "child.py"
    code.write_text("import time\nprint('noise')\nprint('RESULT {\"n\": 1}', flush=True)\ntime.sleep(60)\n")
    seen: list[dict] = []
    assert children.run_child(str(code), [], 3.0, seen.append) == "stopped after 3 s"
    assert seen == [{"n": 1}]
    code.write_text("import os\nos._exit(7)\n")
    assert children.run_child(str(code), [], 30.0, seen.append) == "ended with code 7"


def test_a_failure_is_a_result(script, capsys):
    children = script("gpu_children")

    def fails() -> dict:
        raise MemoryError("RESOURCE_EXHAUSTED: a | b\nmore")

    assert not children.attempt(fails, {"name": "x"})
    assert capsys.readouterr().out == 'RESULT {"name": "x", "error": "MemoryError: RESOURCE_EXHAUSTED: a / b"}\n'
