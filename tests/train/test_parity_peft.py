"""The loss curve of HF PEFT: the same first LoRA, the same batches, AdamW with clipping and a cosine."""

from __future__ import annotations

import copy
from pathlib import Path
from pydoc_data.topics import topics

import jax
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file
from tests.real import real_gemma
from tests.tiny import tiny
from tests.train.conftest import examples, losses
from transformers import get_cosine_schedule_with_warmup

from jora.data.batches import Tokenised
from jora.methods.lora import LoRA
from jora.methods.storage import WEIGHTS, save_adapter
from jora.models.model import Model, load_model
from jora.train import TrainOptions, train


def peft_losses(model: torch.nn.Module, order: list[list[Tokenised]], options: TrainOptions) -> list[float]:
    """Train on one list of examples a step; the mean loss per answer token of each."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=options.learning_rate, weight_decay=options.weight_decay)
    scheduler = get_cosine_schedule_with_warmup(optimizer, round(options.warmup * options.max_steps), options.max_steps)
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


def curves(
    reference: torch.nn.Module, model: Model, method: LoRA, data: list[Tokenised], options: TrainOptions, out: Path
) -> tuple[list[float], list[float]]:
    """(our losses, PEFT's) from the same first factors."""
    adapter = method.init(model, jax.random.key(1))
    save_adapter(adapter, out / "first")
    ours = train(model, adapter, data, out=out / "run", options=options)
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(reference), str(out / "first"), is_trainable=True)
    return losses(ours), peft_losses(wrapped.train(), planned(data, options), options)


def test_thirty_steps_agree(tmp_path: Path) -> None:
    reference, directory = tiny("llama3")
    model = load_model(directory, dtype="float32")
    options = TrainOptions(max_steps=30, batch_size=4, max_length=24, learning_rate=3e-2, warmup=0.1, weight_decay=0.01)
    ours, theirs = curves(reference, model, LoRA(rank=4, alpha=8), examples(12), options, tmp_path)
    np.testing.assert_allclose(ours, theirs, atol=1e-3, rtol=0)
    assert theirs[-1] < 0.6 * theirs[0]  # there was something to agree on


@pytest.mark.slow
def test_five_steps_of_the_real_gemma_agree(tmp_path: Path) -> None:
    reference, model = real_gemma()
    text = "\n\n".join(topics[name] for name in ("assignment", "class", "compound", "import"))
    ids = np.array(model.tokenizer.encode(text, add_special_tokens=False), np.int32)
    # Rows of 96 tokens, of which the last 24 carry loss.
    data = [Tokenised(np.r_[np.int32(2), row], np.arange(96) >= 72) for row in ids[: 8 * 95].reshape(8, 95)]
    options = TrainOptions(max_steps=5, batch_size=2, max_length=96, learning_rate=5e-4, warmup=0.2, weight_decay=0.01)
    ours, theirs = curves(reference, model, LoRA(rank=16, alpha=32), data, options, tmp_path)
    np.testing.assert_allclose(ours, theirs, atol=1e-3, rtol=0)
    adapted = [abs(np.asarray(b)).max() for b in load_file(tmp_path / "run" / "adapter" / WEIGHTS).values()]
    assert min(adapted) > 0  # every factor took part


def planned(data: list[Tokenised], options: TrainOptions) -> list[list[Tokenised]]:
    """The examples of each step, in the order in which `train` takes them."""
    from jora.data.batches import Batches
    from jora.sharding import single_device
    from jora.train.feed import Schedule, batch_options

    batches = Batches(data, batch_options(options, single_device()), options.seed)
    schedule = Schedule(batches, options.epochs, options.max_steps)
    return [[data[i] for row in schedule.step(n)[1].rows for i in row] for n in range(options.max_steps)]
