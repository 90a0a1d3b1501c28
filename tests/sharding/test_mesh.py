"""From text to devices, and what is said where there are too few."""

from __future__ import annotations

import subprocess
import sys

import jax
import pytest
from tests.tiny import tiny

from jora.errors import InputError
from jora.sharding import MeshSpec, build_layout, host_device, parse_mesh
from jora.sharding.mesh import MOST_SIMULATED


def test_axes_in_any_order() -> None:
    assert parse_mesh("tensor=2, data=3") == MeshSpec(data=3, tensor=2)
    assert parse_mesh(None) == MeshSpec()


@pytest.mark.parametrize("text", ["tensor", "tensor=0", "tensor=-1", "model=2", "data=2,data=2", "fsdp=x"])
def test_what_is_no_mesh(text: str) -> None:
    with pytest.raises(InputError, match=f"mesh '{text}'"):
        parse_mesh(text)


def test_too_few_devices() -> None:
    """This process has begun with eight; more could have been asked for, but not any number."""
    with pytest.raises(InputError, match=r"needs 16 devices, this machine has 8 \(cpu\); .*jax_num_cpu_devices\", 16"):
        build_layout(MeshSpec(tensor=16), 4)
    with pytest.raises(InputError, match=rf"needs {MOST_SIMULATED + 1} devices, this machine has 8 \(cpu\)$"):
        build_layout(MeshSpec(data=MOST_SIMULATED + 1), 4)
    assert jax.device_count() == 8


def test_a_process_of_its_own_simulates_what_is_missing() -> None:
    """With nothing but `load_model`, as docs/parallelism.md has it; a thousand are refused and not tried."""
    script = f"""
import jora
model = jora.load_model({tiny("llama3")[1]!r}, mesh="data=2,tensor=2")
print(model.layout.devices)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["4"], done.stderr
    script = script.replace("data=2,tensor=2", "tensor=1000")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert f"InputError: mesh data=1,fsdp=1,tensor=1000: needs 1000 devices, this machine has {MOST_SIMULATED}" in (
        done.stderr
    )


def test_a_host_that_jax_may_not_use(monkeypatch) -> None:
    """JAX_PLATFORMS=cuda: jax has no CPU then."""
    assert host_device().platform == "cpu"

    def devices(backend: str | None = None) -> list[jax.Device]:
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(InputError, match=r"name it in JAX_PLATFORMS too \(cuda,cpu\)"):
        host_device()


def test_over_several_hosts_a_mesh_takes_all_devices(monkeypatch) -> None:
    """Some hosts would have no part in the programs, and wait for ever."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(InputError, match="it must take all of their 8 devices"):
        build_layout(MeshSpec(tensor=4), 4)
    assert build_layout(MeshSpec(fsdp=2, tensor=4), 4).devices == 8
