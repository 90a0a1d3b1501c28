"""Prompt tuning against PEFT and transformers: files both ways, logits, gradients, generation."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from tests.tiny import VOCAB, assert_close, logits, tiny, tokens

import jora
from jora.data.batches import Batches, BatchOptions, Tokenised
from jora.errors import InputError
from jora.inference.tokens import generate_tokens
from jora.methods.method import Adapter, State
from jora.methods.prompt_tuning import PromptTuning
from jora.models.model import Model
from jora.train.feed import to_devices
from jora.train.step import Program, gradients

SLOTS = 5
METHOD = PromptTuning(prompt_tokens=SLOTS)
# A window shorter than prompt and prefix, embeddings with a scale; and neither.
FAMILIES = ["gemma3", "llama3"]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: Any) -> tuple[Any, Model]:
    return tiny(request.param)[0], jora.load_model(tiny(request.param)[1], dtype="float32")


@pytest.fixture(scope="module")
def llama() -> tuple[Any, Model]:
    return tiny("llama3")[0], jora.load_model(tiny("llama3")[1], dtype="float32")


def peft_model(hf: Any) -> PeftModel:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=SLOTS)
    return get_peft_model(copy.deepcopy(hf), config).eval()


def peft_logits(model: PeftModel, ids: np.ndarray) -> np.ndarray:
    return logits(model, ids)[:, SLOTS:]


def test_a_peft_directory_loads(pair: Any, tmp_path: Path) -> None:
    hf, model = pair
    theirs = peft_model(hf)
    theirs.save_pretrained(str(tmp_path))
    adapter = jora.load_adapter(tmp_path, model)
    assert isinstance(adapter.method, PromptTuning)
    assert_close(model(tokens(), adapter), peft_logits(theirs, tokens()))


def test_peft_loads_our_directory(pair: Any, tmp_path: Path) -> None:
    hf, model = pair
    adapter = METHOD.init(model, jax.random.key(1))
    jora.save_adapter(adapter, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`|Model with `tie_word_embeddings=True`")
        theirs = PeftModel.from_pretrained(copy.deepcopy(hf), str(tmp_path / "adapter")).eval()
    assert_close(model(tokens(), adapter), peft_logits(theirs, tokens()))
    assert np.abs(np.asarray(model(tokens(), adapter)) - logits(hf, tokens())).max() > 0.1


def edited(directory: Path, **changes: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num_transformer_submodules", 2),
        ("modules_to_save", ["lm_head"]),
        ("num_virtual_tokens", None),
        ("an_option_of_the_future", 3),
    ],
)
def test_refused_options_of_peft(llama: Any, option: str, value: Any, tmp_path: Path) -> None:
    jora.save_adapter(METHOD.init(llama[1], jax.random.key(0)), tmp_path / "adapter")
    edited(tmp_path / "adapter", **{option: value})
    with pytest.raises(InputError, match=option):
        jora.load_adapter(tmp_path / "adapter", llama[1])


def test_a_prompt_of_another_length_is_refused(llama: Any, tmp_path: Path) -> None:
    jora.save_adapter(METHOD.init(llama[1], jax.random.key(0)), tmp_path / "adapter")
    edited(tmp_path / "adapter", num_virtual_tokens=7)
    with pytest.raises(InputError, match=r"prompt_embeddings has shape \(5, 32\).*\(7, 32\)"):
        jora.load_adapter(tmp_path / "adapter", llama[1])


def test_loss_and_gradient_equal_peft(llama: Any) -> None:
    """Through the batches that training uses: rows of unequal lengths, padded, with the slots reserved."""
    hf, model = llama
    draw = np.random.default_rng(0)
    examples = []
    for length, answers in ((9, 2), (17, 5), (13, 1)):
        loss = np.zeros(length, bool)
        loss[-answers:] = True
        examples.append(Tokenised(draw.integers(3, VOCAB, length).astype(np.int32), loss))
    theirs = peft_model(hf)
    prompt = theirs.prompt_encoder.default.embedding.weight
    labels, ids, mask = np.full((3, 17), -100), np.zeros((3, 17), int), np.zeros((3, 17), int)
    for row, example in enumerate(examples):
        size = len(example.tokens)
        ids[row, :size], mask[row, :size] = example.tokens, 1
        labels[row, :size] = np.where(example.loss, example.tokens, -100)
    loss = theirs(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), labels=torch.tensor(labels)).loss
    loss.backward()
    cut = BatchOptions(rows=4, row_multiple=4, max_length=32, shuffle=False, length_buckets=1, prompt_slots=SLOTS)
    batches = Batches(examples, cut)
    (step,) = batches.plan(0)
    on_devices = to_devices(batches.build(step), model.layout, packed=False)
    program = Program(model.config, model.layout, METHOD, None, "none")  # type: ignore[arg-type]
    trained = {"prompt": prompt.detach().numpy()}
    run = jax.jit(lambda trained: gradients(trained, {}, model.params, on_devices, None, program))
    ours, gradient = run(trained)
    assert float(ours) == pytest.approx(loss.item(), rel=1e-5)
    assert_close(gradient["prompt"], prompt.grad.numpy(), 1e-4)


PROMPTS = [np.random.default_rng(n).integers(3, 99, n).tolist() for n in (19, 4)]


def greedy_after(hf: Any, prefix: np.ndarray, prompt: list[int], new: int) -> list[int]:
    """What transformers generates after one soft prompt and one prompt, alone."""
    with torch.no_grad():
        words = hf.get_input_embeddings()(torch.tensor([prompt]))
        embedded = torch.cat([torch.tensor(prefix)[None], words], dim=1)
        mask = torch.ones(embedded.shape[:2], dtype=torch.long)
        options = dict(max_new_tokens=new, do_sample=False, eos_token_id=2)
        found = hf.generate(inputs_embeds=embedded, attention_mask=mask, **options)[0].tolist()
    return found[:-1] if found[-1] == 2 else found


def test_generation_equals_transformers() -> None:
    """Prompts of unequal lengths share a batch; a window shorter than they are; more than one run of decode steps."""
    hf, path = tiny("gemma3", num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    model = jora.load_model(path, dtype="float32")
    prompt = 0.5 * jax.random.normal(jax.random.key(3), (SLOTS, model.config.embed))
    adapter = Adapter(METHOD, State({"prompt": prompt}, {}), model.config, {})
    found = generate_tokens(model, PROMPTS, adapter, max_new_tokens=34)
    assert found == [greedy_after(hf, np.array(prompt), p, 34) for p in PROMPTS]
    assert found != [greedy_after(hf, np.zeros((0, 32), np.float32), p, 34) for p in PROMPTS]


def test_positions_of_the_prompt_count(llama: Any) -> None:
    model = llama[1]
    adapter = METHOD.init(model, jax.random.key(0))
    limit = model.config.max_positions
    with pytest.raises(InputError, match=r"and 5 of the adapter"):
        generate_tokens(model, [[3] * 10], adapter, max_new_tokens=limit - 14)


def test_starts(llama: Any) -> None:
    model = llama[1]
    rows = np.asarray(METHOD.init(model, jax.random.key(0)).state.trained["prompt"])
    table = np.asarray(model.params.embed)[:VOCAB]
    assert all((np.abs(table - row).max(axis=1) == 0).any() for row in rows)
    drawn = PromptTuning(prompt_tokens=400, start="random").init(model, jax.random.key(0)).state.trained["prompt"]
    assert (float(drawn.mean()), float(drawn.std())) == pytest.approx((0.0, 1.0), abs=0.03)


@pytest.mark.parametrize("wrong", [dict(prompt_tokens=0), dict(start="text")])
def test_bad_options(wrong: Any) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        PromptTuning(**wrong)


def test_a_soft_prompt_is_no_weight(llama: Any) -> None:
    with pytest.raises(InputError, match="neither merged"):
        jora.merge(llama[1], METHOD.init(llama[1], jax.random.key(0)))


def test_packing_is_refused_in_one_line() -> None:
    with pytest.raises(InputError, match="turn packing off"):
        BatchOptions(packing=True, prompt_slots=SLOTS)


def test_segments_are_refused(llama: Any) -> None:
    adapter = METHOD.init(llama[1], jax.random.key(0))
    with pytest.raises(InputError, match="no positions or segments"):
        llama[1](tokens(), adapter, segments=np.ones((2, 33), np.int32))
