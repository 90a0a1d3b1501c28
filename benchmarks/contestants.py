"""One contestant in its own process: it loads, then takes one training step for each line "step" on its input.

`python contestants.py NAME DIRECTORY` reads DIRECTORY/task.json, which train_vs_peft.py wrote, and answers on its
output with one JSON object a line: first {"ready": ...}, then one for every step. All of them start from the same
LoRA factors (a PEFT directory), train on the same row and use AdamW with the same constant rate and clipping.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from machine import peak_bytes

CLIP = 1.0


class Task(NamedTuple):
    """What every contestant is given. `tokens` [s]; the last `answers` of them carry loss."""

    model: str
    adapter: str
    tokens: np.ndarray
    answers: int
    rate: float
    max_steps: int


class Stopped(Exception):
    """The parent wants no more steps."""


class Channel:
    """Commands on stdin, answers on what stdout was; whatever else the libraries print goes to stderr."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def send(self, **message: Any) -> None:
        print(json.dumps(message), file=self._out)

    def wait(self) -> None:
        """Until the next step is wanted. Raises Stopped at the end of the input."""
        if sys.stdin.readline().strip() != "step":
            raise Stopped

    @contextmanager
    def timed(self) -> Iterator[list[float]]:
        """Time one step; the block appends its loss to the list that it is given."""
        losses: list[float] = []
        cpu, start = time.process_time(), time.perf_counter()
        yield losses
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        self.send(loss=losses[0], seconds=seconds, cpu_seconds=cpu, peak_bytes=peak_bytes())

    def serve(self, step: Callable[[], float], **ready: Any) -> None:
        """Take steps as they are asked for."""
        self.send(ready={"peak_bytes": peak_bytes(), **ready})
        while True:
            self.wait()
            with self.timed() as losses:
                losses.append(step())


# --- Jora ---


def run_jora(task: Task, channel: Channel, remat: str) -> None:
    """What `jora.train` runs for each step: its programs, its choice of remat, its feed of the batch."""
    import jax

    from jora.data.batches import Batches, Tokenised
    from jora.methods.storage import load_adapter
    from jora.models.model import load_model
    from jora.sharding.memory import free_bytes
    from jora.train.feed import Schedule, batch_options, to_devices
    from jora.train.memory import ProgramMemory
    from jora.train.optimizer import make_optimizer
    from jora.train.options import TrainOptions
    from jora.train.programs import Programs, abstract_params_of
    from jora.train.remat import choose_remat
    from jora.train.state import abstract_adapter, abstract_train_state, first_train_state
    from jora.train.step import Program

    model = load_model(task.model, dtype="float32")
    adapter = load_adapter(task.adapter, model)
    layout, length = model.layout, len(task.tokens)
    options = TrainOptions(
        batch_size=1,
        max_steps=task.max_steps,
        max_length=length,
        learning_rate=task.rate,
        schedule="constant",
        warmup=0.0,
        max_grad_norm=CLIP,
    )
    batches = Batches([Tokenised(task.tokens, _mask(task))], batch_options(options, layout), options.seed)
    schedule = Schedule(batches, options.epochs, options.max_steps)
    optimizer = make_optimizer(options, schedule.total)
    shapes = abstract_adapter(adapter.method, adapter.state, model.config, layout)
    abstract = abstract_train_state(shapes.trained, optimizer, layout)
    program = Program(model.config, layout, adapter.method, optimizer, "none")
    programs = Programs(program, abstract, shapes.constant, abstract_params_of(model), options)
    state = first_train_state(adapter, abstract, optimizer)
    (shape,) = schedule.shapes

    def compiled(policy: Any) -> Any:
        return programs.compile_train(shape, program._replace(remat=policy))

    chosen = choose_remat(compiled, free_bytes(layout)) if remat == "auto" else remat
    train_step = compiled(chosen)
    seed = jax.device_put(np.uint32(0), layout.sharding(()))
    number = 0

    def step() -> float:
        nonlocal state, number
        _, planned = schedule.step(number)
        batch = to_devices(batches.build(planned), layout, packed=options.packing)
        state, metrics = train_step(state, adapter.state.constant, model.params, batch, seed)
        number += 1
        return float(jax.block_until_ready((state, metrics))[1]["loss"])

    channel.serve(step, remat=chosen, program=ProgramMemory.of(train_step)._asdict())


def _mask(task: Task) -> np.ndarray:
    mask = np.zeros(len(task.tokens), bool)
    mask[-task.answers :] = True
    return mask


# --- the peers ---


def _peft_model(task: Task) -> Any:
    import peft
    import torch
    import transformers

    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(
        task.model, dtype=torch.float32, attn_implementation="sdpa"
    )
    return peft.PeftModel.from_pretrained(base, task.adapter, is_trainable=True).train()


def run_peft(task: Task, channel: Channel, *, checkpointing: bool) -> None:
    """The plain loop: the model's own loss over all logits, backward, clip, AdamW."""
    import torch

    model = _peft_model(task)
    model.config.use_cache = False
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=task.rate, weight_decay=0.0)
    ids = torch.from_numpy(task.tokens.astype(np.int64))[None]
    labels = torch.where(torch.from_numpy(_mask(task))[None], ids, -100)

    def step() -> float:
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    channel.serve(step, trained=sum(p.numel() for p in trained))


def run_trl(task: Task, channel: Channel) -> None:
    """`SFTTrainer.train` itself, with its defaults (loss, checkpointing, collator, optimiser).

    A callback holds every step until it is asked for, and times it from there to the end of the optimiser's step.
    """
    import tempfile

    import datasets
    import transformers
    import trl

    class Gate(transformers.TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            channel.wait()
            self.timing = channel.timed()
            self.losses = self.timing.__enter__()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.losses.append(float(trainer.last_loss))
            self.timing.__exit__(None, None, None)

    class Trainer(trl.SFTTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            self.last_loss = super().training_step(*args, **kwargs)
            return self.last_loss

    row = {"input_ids": task.tokens.tolist(), "labels": np.where(_mask(task), task.tokens, -100).tolist()}
    with tempfile.TemporaryDirectory() as out:
        options = trl.SFTConfig(
            out,
            per_device_train_batch_size=1,
            max_steps=task.max_steps,
            max_length=None,
            learning_rate=task.rate,
            lr_scheduler_type="constant",
            max_grad_norm=CLIP,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        data = datasets.Dataset.from_list([row] * task.max_steps)
        trainer = Trainer(_peft_model(task), options, train_dataset=data, processing_class=_tokenizer(task))
        trainer.add_callback(Gate())
        about = {"loss_type": options.loss_type, "gradient_checkpointing": options.gradient_checkpointing}
        channel.send(ready={"peak_bytes": peak_bytes(), **about})
        trainer.train()


def _tokenizer(task: Task) -> Any:
    """SFTTrainer wants one for its padding token; a model directory without a tokenizer gets a stand-in."""
    import tokenizers
    import transformers

    if (Path(task.model) / "tokenizer.json").exists():
        return transformers.AutoTokenizer.from_pretrained(task.model)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "<eos>": 2}, unk_token="<pad>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def main() -> None:
    name, directory = sys.argv[1], Path(sys.argv[2])
    channel = Channel()
    given = json.loads((directory / "task.json").read_text())
    task = Task(**{**given, "tokens": np.asarray(given["tokens"], np.int32)})
    kind, _, remat = name.partition(":")
    runners: dict[str, Callable[[], None]] = {
        "jora": lambda: run_jora(task, channel, remat),
        "peft-checkpointing": lambda: run_peft(task, channel, checkpointing=True),
        "peft": lambda: run_peft(task, channel, checkpointing=False),
        "trl": lambda: run_trl(task, channel),
    }
    try:
        runners[kind]()
    except Stopped:
        return


if __name__ == "__main__":
    main()
