"""Generation against transformers' `generate`, greedy, in fp32."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tests.inference.characters import END_OF_TURN, talking, tokenizer
from tests.tiny import FAMILIES, tiny

import jora
from jora.errors import InputError
from jora.inference import decode as programs
from jora.inference.ends import end_tokens
from jora.inference.generate import generate
from jora.inference.sampling import sampling_rows
from jora.inference.tokens import bucket, generate_tokens

NEW = 40  # more than one run of decode steps
PROMPTS = [np.random.default_rng(n).integers(3, 99, n).tolist() for n in (3, 19, 9, 30)]


def greedy(hf: Any, prompt: list[int], new: int = NEW, eos: int = 2) -> list[int]:
    """What transformers generates after one prompt, without the end token."""
    ids = torch.tensor([prompt])
    out = hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=eos)
    found = out[0, len(prompt) :].tolist()
    return found[:-1] if found[-1] == eos else found


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers(family):
    # Window 7 of the sliding families is shorter than three of the prompts, and prompts share a batch.
    hf, path = tiny(family)
    found = generate_tokens(jora.load_model(path), PROMPTS, max_new_tokens=NEW)
    assert found == [greedy(hf, prompt) for prompt in PROMPTS]


def test_more_prompts_than_rows_keep_their_order():
    hf, path = tiny("llama2")
    prompts = [*PROMPTS, [7], [8, 9]]
    found = generate_tokens(jora.load_model(path), prompts, max_new_tokens=8, batch_size=4)
    assert found == [greedy(hf, prompt, 8) for prompt in prompts]


def test_a_prompt_of_several_attention_blocks():
    hf, path = tiny("gemma3")
    prompt = np.random.default_rng(5).integers(3, 99, 300).tolist()
    assert generate_tokens(jora.load_model(path), [prompt], max_new_tokens=6) == [greedy(hf, prompt, 6)]


def test_an_adapter_changes_what_is_generated_as_merged_weights_do():
    hf, path = tiny("qwen3")
    model = jora.load_model(path)
    adapter = jora.LoRA(rank=3, alpha=6, targets=["q_proj", "down_proj"]).init(model, jax.random.key(0))
    noise = {
        target: {**f, "b": 0.3 * jax.random.normal(jax.random.key(1), f["b"].shape)}
        for target, f in adapter.state.trained.items()
    }
    adapter = replace(adapter, state=adapter.state._replace(trained=noise))
    merged = copy.deepcopy(hf)
    with torch.no_grad():
        for number, layer in enumerate(merged.model.layers):
            for target, linear in (("q_proj", layer.self_attn.q_proj), ("down_proj", layer.mlp.down_proj)):
                a, b = np.asarray(noise[target]["a"][number]), np.asarray(noise[target]["b"][number])
                linear.weight += torch.tensor(2.0 * (a @ b.reshape(3, -1)).T)
    found = generate_tokens(model, PROMPTS, adapter, max_new_tokens=10)
    assert found == [greedy(merged, prompt, 10) for prompt in PROMPTS]
    assert found != generate_tokens(model, PROMPTS, max_new_tokens=10)


@pytest.mark.parametrize("mesh", ["data=2,fsdp=2,tensor=2", "tensor=4", "fsdp=8"])
def test_the_same_tokens_on_every_mesh(mesh):
    hf, path = tiny("llama31")
    found = generate_tokens(jora.load_model(path, mesh=mesh), PROMPTS[:3], max_new_tokens=20)
    assert found == [greedy(hf, prompt, 20) for prompt in PROMPTS[:3]]


@pytest.mark.parametrize(("family", "mesh"), [("llama31", "data=2,fsdp=2,tensor=2"), ("qwen25", "tensor=4")])
def test_no_device_sends_its_cache(family, mesh):
    model = jora.load_model(tiny(family)[1], mesh=mesh)
    program = programs.Program(model.config, model.layout, None)
    rows, slots = 8, 176  # a length that nothing but the cache has
    sampling, ends = sampling_rows(rows), np.array([2], np.int32)
    tokens, lengths = np.ones((rows, 16), np.int32), np.full(rows, 9, np.int32)
    options = dict(program=program)
    prefilled = programs.prefill.lower(model.params, None, tokens, lengths, sampling, ends, **options, slots=slots)
    stream, *_ = programs.prefill(model.params, None, tokens, lengths, sampling, ends, **options, slots=slots)
    decoded = programs.decode.lower(model.params, None, stream, sampling, ends, np.int32(4), **options)
    kv_shards = model.layout.axis_size("kv_heads")
    share = slots * rows // model.layout.batch_shards * model.config.kv_heads // kv_shards
    for lowered in (prefilled, decoded):
        text = lowered.compile().as_text()
        assert f"[{model.config.layers},{rows // model.layout.batch_shards},{slots}," in text
        for shape, _ in re.findall(r"= \(?(\w+\[[\d,]*\]).* (all-gather|all-to-all|collective-permute)\(", text):
            assert f",{slots}," not in shape, f"{shape} moves {share} slots of the cache"


def test_the_next_prompt_of_a_bucket_compiles_nothing():
    model = jora.load_model(tiny("llama2")[1])
    generate_tokens(model, PROMPTS[1:3], max_new_tokens=9)
    sizes = programs.prefill._cache_size(), programs.decode._cache_size()
    generate_tokens(model, [PROMPTS[1][:17], PROMPTS[2]], max_new_tokens=12, temperature=1.0, top_k=3, ends=[4, 5])
    assert (programs.prefill._cache_size(), programs.decode._cache_size()) == sizes


def test_buckets_hold_their_length_and_waste_at_most_half():
    sizes = [bucket(n) for n in range(1, 3000)]
    assert all(size >= n for n, size in enumerate(sizes, 1))
    assert all(size <= max(16, 1.5 * n) for n, size in enumerate(sizes, 1))
    assert len(set(sizes)) == 16


def test_a_row_ends_at_its_end_token_and_others_go_on():
    model = jora.load_model(tiny("llama2")[1])
    free = generate_tokens(model, PROMPTS, max_new_tokens=NEW, ends=())
    end = free[1][4]
    found = generate_tokens(model, PROMPTS, max_new_tokens=NEW, ends=(98, end))
    for short, long in zip(found, free, strict=True):
        cut = min((long.index(e) for e in (98, end) if e in long), default=NEW)
        assert short == long[:cut]
    assert len(found[1]) <= 4


def test_a_draw_does_not_depend_on_the_batch():
    model = jora.load_model(tiny("llama2")[1])
    options = dict(max_new_tokens=8, temperature=1.5, top_p=0.95, seed=3)
    together = generate_tokens(model, PROMPTS, **options)
    assert together == generate_tokens(model, PROMPTS, batch_size=2, **options)
    assert together != generate_tokens(model, PROMPTS, **{**options, "seed": 4})
    twins = generate_tokens(model, [PROMPTS[0]] * 2, **options)
    assert twins[0] != twins[1]


def test_end_tokens_come_from_every_place_that_names_them(tmp_path):
    _, model = talking("llama2", tmp_path)
    model.hf_config["eos_token_id"] = [5, 6]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert end_tokens(model) == (5, 6, 7)


def test_the_end_of_a_turn_ends_text(tmp_path):
    _, model = talking("llama2", tmp_path)
    from jora.data.chat import Template

    assert tokenizer().convert_tokens_to_ids(END_OF_TURN) == 3
    assert end_tokens(model, Template(model.tokenizer)) == (2, 3)


def test_text_in_text_out(tmp_path):
    hf, model = talking("llama2", tmp_path)
    prompts = ["What is x?", "def f(a, b):"]
    expected = []
    for prompt in prompts:
        ids = tokenizer()(prompt)["input_ids"]
        new = greedy(hf, ids, 12)
        new = new[: new.index(3)] if 3 in new else new
        expected.append(tokenizer().decode(new, skip_special_tokens=True))
    assert generate(model, prompts, max_new_tokens=12) == expected
    assert generate(model, prompts[0], max_new_tokens=12) == expected[0]
    assert generate(model, [], max_new_tokens=12) == []


def test_a_conversation_goes_through_the_chat_template(tmp_path):
    _, model = talking("llama2", tmp_path)
    chat = [{"role": "user", "content": "Hi"}]
    written = generate(model, "[user]Hi\n[assistant]", max_new_tokens=9)
    assert generate(model, chat, max_new_tokens=9) == written
    assert generate(model, [chat, "Hi"], max_new_tokens=9)[0] == written


def test_stop_strings_cut_the_text(tmp_path):
    _, model = talking("llama2", tmp_path)
    text = generate(model, "Hello", max_new_tokens=40)
    stop = text[10:12]
    cut = text[: text.index(stop)]
    assert generate(model, "Hello", max_new_tokens=40, stop=stop) == cut
    assert generate(model, "Hello", max_new_tokens=40, stop=["not there", stop]) == cut
    tokens = tokenizer()("Hello")["input_ids"]
    stopped = generate_tokens(model, [tokens], max_new_tokens=40, ends=(2, 3), stopped=lambda ids: len(ids) >= 11)
    assert len(stopped[0]) == 11


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[]], {}, "prompt 0 is empty"),
        ([[1], [1] * 500], dict(max_new_tokens=20), "prompt 1: its 500 tokens"),
        ([[1]], dict(max_new_tokens=0), "max_new_tokens"),
        ([[1]], dict(batch_size=0), "batch_size"),
        ([[1]], dict(top_p=2.0), "top_p"),
    ],
)
def test_bad_input_is_refused(prompts, options, message):
    with pytest.raises(InputError, match=message):
        generate_tokens(jora.load_model(tiny("llama2")[1]), prompts, **options)


def test_a_conversation_that_ends_with_the_assistant_is_refused(tmp_path):
    _, model = talking("llama2", tmp_path)
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    with pytest.raises(InputError, match="ends with the assistant"):
        generate(model, chat)


def test_progress_counts_prompts():
    told = []

    class Listener:
        def start(self, total, what, done=0):
            told.append((total, what))

        def update(self, done, **fields):
            told.append(done)

        def finish(self, **fields):
            told.append(fields["tokens"])

    model = jora.load_model(tiny("llama2")[1])
    found = generate_tokens(model, PROMPTS, max_new_tokens=4, batch_size=2, reporter=Listener())
    assert told[0] == (4, "generating, prompts")
    assert told[-2:] == [4, sum(map(len, found))]
    assert jnp.array(told[1:-1]).tolist() == sorted(told[1:-1])
