"""The loss curve of HF PEFT: the same first LoRA, the same batches, AdamW with clipping and a cosine."""

from __future__ import annotations

import copy
from pathlib import Path

import jax
import numpy as np
import peft
import torch
from tests.tiny import tiny
from tests.train.conftest import examples, losses
from transformers import get_cosine_schedule_with_warmup

from jora.data.batches import Tokenised
from jora.methods.lora import LoRA
from jora.methods.storage import save_adapter
from jora.models.model import load_model
from jora.train import TrainOptions, train

STEPS = 30
RATE = 3e-2


def peft_losses(model: torch.nn.Module, order: list[list[Tokenised]]) -> list[float]:
    """Train on one list of examples a step; the mean loss per answer token of each."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.01)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 3, STEPS)
    found = []
    for batch in order:
        width = max(len(e.tokens) for e in batch)
        ids, labels = torch.zeros(len(batch), width, dtype=torch.long), torch.full((len(batch), width), -100)
        mask = torch.zeros_like(ids)
        for row, example in enumerate(batch):
            tokens = torch.from_numpy(example.tokens.astype(np.int64))
            size = len(tokens)
            ids[row, :size], mask[row, :size] = tokens, 1
            labels[row, :size] = torch.where(torch.from_numpy(example.loss), tokens, -100)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


def test_thirty_steps_agree(tmp_path: Path) -> None:
    reference, directory = tiny("llama3")
    model = load_model(directory, dtype="float32")
    data = examples(12)
    options = TrainOptions(
        max_steps=STEPS, batch_size=4, max_length=24, learning_rate=RATE, warmup=0.1, weight_decay=0.01
    )
    adapter = LoRA(rank=4, alpha=8).init(model, jax.random.key(1))
    save_adapter(adapter, tmp_path / "first")
    ours = train(model, adapter, data, out=tmp_path / "run", options=options)

    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(reference), str(tmp_path / "first"), is_trainable=True)
    theirs = peft_losses(wrapped.train(), planned(data, options))
    np.testing.assert_allclose(losses(ours), theirs, atol=1e-3, rtol=0)
    assert theirs[-1] < 0.6 * theirs[0]  # there was something to agree on


def planned(data: list[Tokenised], options: TrainOptions) -> list[list[Tokenised]]:
    """The examples of each step, in the order in which `train` takes them."""
    from jora.data.batches import Batches
    from jora.sharding import single_device
    from jora.train.feed import Schedule, batch_options

    batches = Batches(data, batch_options(options, single_device()), options.seed)
    schedule = Schedule(batches, options.epochs, options.max_steps)
    return [[data[i] for row in schedule.step(n)[1].rows for i in row] for n in range(STEPS)]
