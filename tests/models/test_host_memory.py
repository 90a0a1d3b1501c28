"""Loading, merging and converting stream: host memory stays near one layer, whatever the model's size.

A child process runs each of them on a small model first, so that the code itself and the compiler are not
counted, and then on one of 360 MB. Anonymous memory is sampled; the device copies (on a CPU anonymous too)
are taken off.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.numpy import save_file
from tests.models.gguf.conftest import write_gguf
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")

CHILD = """
import sys, threading, time, warnings
from pathlib import Path
import jax

def anonymous():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])

class Watch:
    def __enter__(self):
        self.peak = self.start = anonymous()
        self.open = True
        self.thread = threading.Thread(target=self.sample)
        self.thread.start()
        return self
    def sample(self):
        while self.open:
            self.peak = max(self.peak, anonymous())
            time.sleep(0.001)
    def __exit__(self, *_):
        self.open = False
        self.thread.join()
        self.over = self.peak - self.start

from jora import LoRA, load_model, merge
from jora.models.convert import convert
small, large = map(Path, sys.argv[1:])

def load(folder, **options):
    return load_model(folder / "hf", **options)
def write(model, folder):
    merge(model, LoRA(rank=4).init(model, jax.random.key(0))).save(folder / "merged")
def change(folder):
    convert(folder / "model.gguf", folder / "converted")

write(load(small), small); change(small); load(small, quant="nf4")
for name, options in (("quantise", {"quant": "nf4"}), ("load", {})):
    with Watch() as watch:
        model = load(large, **options)
    print(name, watch.over - sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)))
    if options:
        del model
with Watch() as watch:
    write(model, large)
print("merge", watch.over)
del model
with Watch() as watch:
    change(large)
print("convert", watch.over)
"""


def make(folder: Path, **sizes: Any) -> int:
    """A random model as safetensors and as GGUF; the bytes of its largest layer or tensor."""
    config = LlamaConfig(num_attention_heads=16, num_key_value_heads=16, max_position_embeddings=64, **sizes)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    generator = np.random.default_rng(0)
    weights = {n: generator.random(tuple(p.shape), np.float32) for n, p in model.state_dict().items()}
    (folder / "hf").mkdir(parents=True)
    save_file(weights, folder / "hf" / "model.safetensors", metadata={"format": "pt"})
    config.architectures = ["LlamaForCausalLM"]
    (folder / "hf" / "config.json").write_text(json.dumps(config.to_dict()))
    model = model.to_empty(device="cpu")
    model.load_state_dict({n: torch.from_numpy(w) for n, w in weights.items()}, assign=True)
    write_gguf(folder / "model.gguf", "llama", model, kind=GGMLQuantizationType.F16)
    layer = sum(w.nbytes for n, w in weights.items() if ".layers.0." in n)
    return max(layer, *(w.nbytes for w in weights.values()))


@pytest.mark.slow
def test_host_memory_stays_near_one_layer(tmp_path: Path) -> None:
    make(tmp_path / "small", hidden_size=64, intermediate_size=96, vocab_size=300, num_hidden_layers=2)
    unit = make(tmp_path / "large", hidden_size=1024, intermediate_size=2816, vocab_size=20_000, num_hidden_layers=4)
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "small"), str(tmp_path / "large")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    over = {name: int(number) / unit for name, number in (line.split() for line in child.stdout.splitlines())}
    assert over.keys() == {"quantise", "load", "merge", "convert"}
    assert max(over.values()) < 1.5, f"memory over the device copies, in largest tensors of {unit >> 20} MiB: {over}"
