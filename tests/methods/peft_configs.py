"""Any PEFT config on the tiny models: made at random, saved, and loaded again."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file
from tests.methods.gradients import assert_same, loss_and_gradients, weights
from tests.methods.peft_oracle import base
from tests.tiny import assert_close, logits, tiny, tokens

import jora
from jora.methods.method import Adapter, State
from jora.models.model import Model

TIED_WARNING = "Model (has|with) `tie_word_embeddings=True`"


def made(family: str, config: PeftConfig, directory: Path, seed: int = 0) -> PeftModel:
    """The tiny model under `config`, everything that trains moved at random, saved in `directory`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", TIED_WARNING)
        model = get_peft_model(copy.deepcopy(tiny(family)[0]), config).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(str(directory))
    return model


def loaded(family: str, directory: Path, trainable: bool = False) -> PeftModel:
    """A directory on the tiny model; any warning but that of tied tables is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", TIED_WARNING)
        model = copy.deepcopy(tiny(family)[0])
        return PeftModel.from_pretrained(model, str(directory), is_trainable=trainable).eval()


def assert_both_ways(family: str, config: PeftConfig, directory: Path) -> None:
    """PEFT's adapter here, and what is saved here in PEFT: the same logits, which are not the base's; equal files."""
    model, ids = base(family), tokens()
    expected = logits(made(family, config, directory / "theirs"), ids)
    adapter = jora.load_adapter(directory / "theirs", model)
    assert_close(model(ids, adapter), expected)
    assert np.abs(expected - logits(tiny(family)[0], ids)).max() > 0.1 * expected.std()
    jora.save_adapter(adapter, directory / "ours")
    assert_close(logits(loaded(family, directory / "ours"), ids), expected)
    theirs, ours = (load_file(directory / side / "adapter_model.safetensors") for side in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value)


def assert_gradients(model: Model, adapter: Adapter, peft: PeftModel, ids: np.ndarray) -> None:
    """Ours of sum(logits * weights) are PEFT's, of all that PEFT trains and of nothing else."""
    peft.zero_grad()
    scores = peft(torch.from_numpy(ids.astype(np.int64))).logits
    (scores * torch.from_numpy(weights(tuple(scores.shape)))).sum().backward()
    expected = {_stored(n): p.grad.numpy() for n, p in peft.named_parameters() if p.grad is not None}
    found = Adapter(
        adapter.method, State(loss_and_gradients(model, adapter, ids)[1], adapter.state.constant), model.config
    )
    files = adapter.method.to_peft(found)
    assert files is not None
    tensors = {e.name: np.concatenate([np.asarray(b) for b in e.blocks()]) for e in files.tensors}
    assert_same({name: value for name, value in tensors.items() if name not in FROZEN}, expected)


FROZEN = ("base_model.vera_A", "base_model.vera_B")


def _stored(parameter: str) -> str:
    """A parameter's name in PEFT's file."""
    return parameter.replace("modules_to_save.", "").replace(".default", "")


def edit(directory: Path, **changes: Any) -> None:
    """Change adapter_config.json."""
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
