"""What XLA makes of Jora's programs at the shape of Llama 2 7B for an NVIDIA H200, on a machine that has none.

    PYTHONPATH=src python benchmarks/gpu_compile.py train decode galore [--tokens 2048] [--remat full] [--hlo DIR]

The compiler wants a description of the device, not the device: jax's CUDA plugin with its libraries
(`pip install "jax[cuda13]"`) and ptxas are enough. The programs are those of `gpu_programs.py`. For each loop (a pass
over its body is a layer) a line says what the body reads, writes and multiplies, as `hlo_traffic.py` counts it, and for
each program what the compiler says of memory. `--xla` sets options over Jora's own:
`--xla xla_gpu_enable_triton_gemm=true xla_gpu_dot_merger_threshold_mb=32` are XLA's.

Nothing is run, so there are no times, and no autotuning.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # of libraries that only a run needs

import jax
from galore_memory import paper_config
from gpu_programs import METHODS, adapter_step, decode_step, galore_step
from gpu_shapes import llama
from hlo_traffic import loop_bodies
from jax.experimental import topologies

from jora.models.families import config_from_hf
from jora.sharding import parse_mesh
from jora.sharding.layout import make_layout
from jora.train.memory import ProgramMemory

LEAST = 10  # kernels of a loop's body that is worth a line
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 149000000000 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 } runtime_version { major: 13 }
device_description_str: "NVIDIA H200"
"""


def report(name: str, lowered: Any, xla: dict[str, Any], hlo: Path | None) -> None:
    """Compile a program and say what came of it."""
    start = time.perf_counter()
    compiled = lowered.compile(compiler_options=xla)
    seconds, memory, text = time.perf_counter() - start, ProgramMemory.of(compiled), compiled.as_text()
    size = f"{memory.total / 1e9:.2f} GB ({memory.total / 2**30:.2f} GiB)"
    print(f"{name}: {size}, of which {memory.added / 1e9:.2f} GB besides arguments; compiled in {seconds:.1f} s")
    for body in loop_bodies(text):
        if body.kernels >= LEAST:
            traffic = f"reads {body.read / 1e6:,.0f} MB, writes {body.written / 1e6:,.0f} MB"
            print(f"  {body.name}: {traffic}, {body.flops / 1e9:,.0f} GFLOP, {body.kernels} kernels")
    if hlo is not None:
        hlo.mkdir(parents=True, exist_ok=True)
        (hlo / f"{name}.txt").write_text(text, encoding="utf-8")


def xla_option(text: str) -> tuple[str, bool | int]:
    """NAME=VALUE of the command line, as `compiler_options` take it."""
    name, _, value = text.partition("=")
    return name, value == "true" if value in ("true", "false") else int(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", nargs="+", choices=["train", "decode", "galore"])
    parser.add_argument("--tokens", type=int, default=512, help="of the training step's row")
    parser.add_argument(
        "--remat", default="selective", choices=["none", "selective", "full"], help="of the training step"
    )
    parser.add_argument("--method", default="lora", choices=METHODS, help="of the training step")
    parser.add_argument("--quant", choices=["int8", "nf4"], help="the base of the training and decode steps")
    parser.add_argument("--projection", default="bfloat16", choices=["bfloat16", "int8"], help="P of GaLore")
    parser.add_argument("--mesh", help="like tensor=4: so many H200 of one host")
    parser.add_argument("--xla", nargs="+", type=xla_option, default=[], metavar="NAME=VALUE")
    parser.add_argument("--hlo", type=Path, metavar="DIR", help="write each optimised module there")
    given = parser.parse_args()
    jax.devices()  # makes the CUDA plugin known
    config, mesh = config_from_hf(llama(False)), parse_mesh(given.mesh)
    described = topologies.get_topology_desc("", "cuda", target_config=H200, topology=f"1x1x{mesh.devices}")
    layout = make_layout(mesh.data, mesh.fsdp, mesh.tensor, 1, described.devices)
    programs = {
        "train": lambda: adapter_step(config, layout, given.tokens, given.remat, given.method, given.quant),
        "decode": lambda: decode_step(config, layout, given.quant),
        "galore": lambda: galore_step(paper_config("7B"), layout, given.projection),
    }
    # Kernels are chosen by the default device, which is a CPU here; Pallas asks the mesh.
    as_if_there = mock.patch.multiple(jax, default_backend=lambda: "gpu", devices=lambda: described.devices)
    with as_if_there, jax.sharding.use_abstract_mesh(layout.mesh.abstract_mesh):
        for name in given.programs:
            report(name, programs[name](), dict(given.xla), given.hlo)


if __name__ == "__main__":
    main()
