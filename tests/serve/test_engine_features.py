"""What a request can ask of the engine, against transformers, PEFT and numpy."""

from __future__ import annotations

import copy
import json
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from tests.bytewise import bytewise_tokenizer
from tests.encoders.tiny_encoders import tiny_encoder, tokenizer
from tests.serve.bases import VOCAB, base, hf_base, randomised
from tests.serve.engines import ADAPTERS, OPTIONS, Reference, ask, compilations, prompt, run, step, text, tokens
from transformers.generation import logits_process

import jora
from jora.encoders.encoder import BertEncoder
from jora.errors import InputError
from jora.serve.adapters.active import Active
from jora.serve.adapters.catalogue import Catalogue
from jora.serve.device import executor
from jora.serve.device.programs import decode
from jora.serve.engine import Engine
from jora.serve.requests import Event, Logprobs, Rejected, UnknownAdapter
from jora.serve.text.grammar import Grammars

EOS = 257
# Likely tokens are printable and no end, so that answers are text.
ASCII = {token: -100.0 for token in range(256) if token not in range(33, 127)} | {EOS: -100.0}
DRAWN = dict(temperature=1.5, top_k=40, top_p=0.95, seed=7)


def processed(processor: logits_process.LogitsProcessor, logits: np.ndarray) -> np.ndarray:
    """What transformers makes of one row."""
    with torch.no_grad():
        return processor(torch.zeros((1, 0), dtype=torch.long), torch.tensor(logits[None])).numpy()[0]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


# --- drawing ---


@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"top_p": 0.6}, {"min_p": 0.2}])
def test_draws_have_the_distribution_of_transformers(engine: Engine, reference: Reference, options: dict) -> None:
    """First tokens of 400 answers to one prompt."""
    request = ask("a", prompt(1, 6), "two", temperature=0.7, max_tokens=1, n=400, seed=3, **options)
    events = run(engine, request)["a"]
    logits = processed(logits_process.TemperatureLogitsWarper(0.7), reference.logits("two", request.prompt)[-1])
    warpers = {
        "top_k": logits_process.TopKLogitsWarper,
        "top_p": logits_process.TopPLogitsWarper,
        "min_p": logits_process.MinPLogitsWarper,
    }
    for name, value in options.items():
        logits = processed(warpers[name](value), logits)
    expected = np.exp(log_softmax(logits))
    found = np.bincount([t for event in events for t in event.tokens], minlength=VOCAB) / 400
    assert not found[expected == 0].any()
    # The expected distance of 400 draws from their distribution, and six times its spread.
    noise = np.sqrt(expected * (1 - expected) / 400).sum() * np.sqrt(2 / np.pi) / 2
    assert np.abs(found - expected).sum() / 2 < noise + 6 * 0.5 / np.sqrt(400)
    assert (expected > 0).sum() > 1


def test_a_seed_draws_the_same_whatever_shares_the_batch(engine_of: Callable[..., Engine]) -> None:
    alone = run(engine_of(), ask("a", prompt(2, 20), "two", n=3, max_tokens=12, **DRAWN))["a"]
    others = [
        ask("b", prompt(3, 50), "three", temperature=1.0, seed=1),
        ask("c", prompt(4, 9), presence_penalty=1.0, logprobs=2),
        ask("d", prompt(5, 3), "one", n=2, temperature=2.0),
    ]
    together = run(engine_of(), *others, ask("a", prompt(2, 20), "two", n=3, max_tokens=12, **DRAWN))["a"]
    answers = [tuple(tokens(alone, index)) for index in range(3)]
    assert answers == [tuple(tokens(together, index)) for index in range(3)]
    assert len(set(answers)) == 3
    other = run(engine_of(), ask("a", prompt(2, 20), "two", max_tokens=12, **{**DRAWN, "seed": 8}))["a"]
    assert tuple(tokens(other)) not in answers


def test_without_a_seed_draws_differ(engine: Engine) -> None:
    events = run(engine, *(ask(name, prompt(2, 5), temperature=2.0) for name in "ab"))
    assert tokens(events["a"]) != tokens(events["b"])


def test_every_answer_of_n_is_greedy_and_told_by_its_index(engine: Engine, reference: Reference) -> None:
    events = run(engine, ask("a", prompt(6, 33), "two", n=6))["a"]
    for index in range(6):
        own = [event for event in events if event.index == index]
        assert tokens(own, index) == reference("two", prompt(6, 33))
        assert [event.finish for event in own] == [None] * 7 + ["length"]
    # One of them computes the prompt, the others wait for its blocks.
    assert sorted({e.index: e.usage.cached for e in events}.values()) == [0, *[32] * 5]


# --- endings ---


def ascii_text(reference: Reference, tokens: tuple[int, ...], count: int) -> str:
    bias = np.zeros(VOCAB, np.float32)
    bias[list(ASCII)] = list(ASCII.values())
    answer = reference.controlled(tokens, count, lambda logits, _: logits + bias)
    return bytewise_tokenizer().decode(answer)


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_across_tokens(engine: Engine, reference: Reference, include: bool) -> None:
    whole = ascii_text(reference, prompt(7, 11), 30)
    stop = whole[9:12]
    options = dict(logit_bias=ASCII, max_tokens=30, ignore_eos=False, stop=("never there", stop), include_stop=include)
    events = run(engine, ask("a", prompt(7, 11), **options))["a"]
    before = whole[: whole.find(stop)]
    assert text(events) == before + (stop if include else "")
    assert (events[-1].finish, events[-1].stopped_by) == ("stop", stop)
    assert events[-1].usage.completion == len(before) + len(stop)


def test_a_stop_token_ends_and_min_tokens_delays_it(engine: Engine, reference: Reference) -> None:
    answer = reference(None, prompt(8, 13), 16)
    wanted = next(token for token in answer if answer.index(token) >= 3)
    end = answer.index(wanted)
    events = run(engine, ask("a", prompt(8, 13), stop_token_ids=(wanted,), max_tokens=16))["a"]
    assert tokens(events) == answer[: end + 1]
    assert (events[-1].finish, events[-1].stopped_by) == ("stop", wanted)

    def forbid(logits: np.ndarray, so_far: list[int]) -> np.ndarray:
        logits[wanted] = -np.inf if len(so_far) < end + 2 else logits[wanted]
        return logits

    request = ask("b", prompt(8, 13), stop_token_ids=(wanted,), min_tokens=end + 2, max_tokens=end + 2)
    found = tokens(run(engine, request)["b"])
    assert found == reference.controlled(request.prompt, end + 2, forbid) and wanted not in found


def test_the_models_end_is_obeyed_ignored_and_put_off(engine: Engine, reference: Reference) -> None:
    """A bias makes the end the likeliest token at some step after the first."""
    logits: list[np.ndarray] = []
    ids = list(prompt(9, 5))
    for _ in range(12):
        logits.append(reference.logits(None, ids)[-1])
        ids.append(int(np.delete(logits[-1], EOS).argmax()))
    gaps = np.array([np.delete(row, EOS).max() - row[EOS] for row in logits])
    bias = float(np.sort(gaps)[1] + np.sort(gaps)[2]) / 2  # two of the twelve steps would end
    first, second = np.flatnonzero(gaps < bias)[:2].tolist()
    options = dict(logit_bias={EOS: bias}, max_tokens=12)
    events = run(
        engine,
        ask("obeys", prompt(9, 5), **options, ignore_eos=False),
        ask("ignores", prompt(9, 5), **options),
        ask("later", prompt(9, 5), **options, ignore_eos=False, min_tokens=first + 1),
    )
    assert tokens(events["obeys"]) == [*ids[5 : 5 + first], EOS]
    assert (events["obeys"][-1].finish, events["obeys"][-1].stopped_by) == ("stop", None)
    assert "</s>" not in text(events["obeys"])
    assert len(tokens(events["ignores"])) == 12 and tokens(events["ignores"])[first] == EOS
    assert tokens(events["later"]) == [*ids[5 : 5 + second], EOS]


def test_max_tokens_defaults_to_what_the_positions_allow(engine: Engine, reference: Reference) -> None:
    events = run(engine, ask("a", prompt(10, 148), max_tokens=None))["a"]
    assert tokens(events) == reference(None, prompt(10, 148), 12)
    assert events[-1].finish == "length" and events[-1].usage == (148, 0, 12)


def test_what_cannot_be_served_is_refused_and_leaves_nothing(engine: Engine) -> None:
    cases = [
        (ask("a", prompt(0, 160)), "160 tokens, which leaves none of 160"),
        (ask("a", prompt(0, 150), max_tokens=11), "max_tokens 11"),
        (ask("a", prompt(0, 155), "soft"), "155 tokens and 5 soft tokens"),
        (ask("a", (1, VOCAB)), f"token {VOCAB}"),
        (ask("a", (1, -1)), "token -1"),
        (ask("a", (1,), logit_bias={VOCAB: 1.0}), f"no token {VOCAB}"),
    ]
    for request, message in cases:
        with pytest.raises(InputError, match=message):
            engine.submit(request)
    for name in ("absent", "../shelf/two", "a" * 300):
        with pytest.raises(InputError):
            engine.submit(ask("a", (1,), name))
    with pytest.raises(UnknownAdapter):
        engine.submit(ask("a", (1,), "absent"))
    assert not engine.has_work and engine.stats().pool_pages["kv"] == 0


def test_a_full_queue_refuses_all_answers_of_a_request(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of(max_queue=3)
    engine.submit(ask("a", prompt(0, 5), n=2))
    with pytest.raises(Rejected, match="queue is full") as refused:
        engine.submit(ask("b", prompt(0, 5), "two", n=2))
    assert refused.value.retry_after >= 1
    assert not engine.knows("b") and engine.stats().waiting == 2
    with pytest.raises(InputError, match="this id already"):
        engine.submit(ask("a", prompt(0, 5)))
    events = run(engine)
    assert set(events) == {"a"} and tokens(events["a"]) == tokens(events["a"], 1) != []
    assert engine.stats().pool_pages["kv"] == 0


# --- logits and their changes ---


def test_penalties_and_bias_are_those_of_transformers_and_numpy(engine: Engine, reference: Reference) -> None:
    bias = {int(token): float(value) for token, value in zip(range(0, 250, 5), np.linspace(-4, 4, 50), strict=True)}

    def repetition(logits: np.ndarray, answer: list[int]) -> np.ndarray:
        ids = torch.tensor([[*prompt(11, 9), *answer]])
        return logits_process.RepetitionPenaltyLogitsProcessor(1.7)(ids, torch.tensor(logits[None])).numpy()[0]

    def counted(logits: np.ndarray, answer: list[int]) -> np.ndarray:
        counts = np.bincount(answer, minlength=VOCAB)
        logits[list(bias)] += list(bias.values())
        return logits - 0.6 * counts - 1.1 * (counts > 0)

    wanted = dict(presence_penalty=1.1, frequency_penalty=0.6, logit_bias=bias)
    events = run(
        engine,
        ask("repetition", prompt(11, 9), "two", repetition_penalty=1.7, max_tokens=16),
        ask("counted", prompt(11, 9), max_tokens=16, **wanted),
    )
    assert tokens(events["repetition"]) == reference.controlled(prompt(11, 9), 16, repetition, "two")
    assert tokens(events["counted"]) == reference.controlled(prompt(11, 9), 16, counted)
    assert tokens(events["repetition"]) != reference("two", prompt(11, 9), 16)
    assert tokens(events["counted"]) != reference(None, prompt(11, 9), 16)


def check_logprobs(found: Logprobs, token: int, expected: np.ndarray, top: int) -> None:
    assert found.token == token
    assert found.logprob == pytest.approx(expected[token], abs=1e-4)
    assert found.rank == 1 + (expected > expected[token]).sum()
    assert [t for t, _ in found.top] == (-expected).argsort()[:top].tolist()
    np.testing.assert_allclose([value for _, value in found.top], np.sort(expected)[::-1][:top], atol=1e-4)


@pytest.mark.parametrize("adapter", [None, "eight", "three"])
def test_logprobs_and_prompt_logprobs(engine: Engine, reference: Reference, adapter: str | None) -> None:
    """Of the model itself, whatever temperature and penalties are; the prompt takes several chunks."""
    asked = prompt(12, 39)
    run(engine, ask("before", asked, adapter))  # its cached prompt must not spare the log probabilities
    request = ask(
        "a", asked, adapter, logprobs=5, prompt_logprobs=3, n=2, temperature=1.2, seed=1, repetition_penalty=1.3
    )
    other = ask("b", prompt(13, 20), prompt_logprobs=0, logprobs=0)
    events = run(engine, request, other)
    for index in range(2):
        own = [event for event in events["a"] if event.index == index]
        ids = [*asked, *tokens(own, index)]
        expected = log_softmax(reference.logits(adapter, ids))
        scores = own[0].prompt_logprobs
        assert scores is not None and scores[0] is None and len(scores) == len(asked)
        for position, score in enumerate(scores[1:], 1):
            assert score is not None
            check_logprobs(score, ids[position], expected[position - 1], 3)
        for position, event in enumerate(own, len(asked)):
            check_logprobs(event.logprobs[0], ids[position], expected[position - 1], 5)
        assert all(event.prompt_logprobs is None for event in own[1:])
    assert events["b"][0].prompt_logprobs is not None and events["b"][0].prompt_logprobs[1].top == ()
    assert events["b"][0].logprobs[0].top == ()


def test_nothing_is_reported_that_was_not_asked_for(engine: Engine) -> None:
    events = run(engine, ask("a", prompt(1, 4)), ask("b", prompt(1, 4), logprobs=1))
    assert not any(event.logprobs or event.prompt_logprobs for event in events["a"])
    assert all(len(event.logprobs) == 1 for event in events["b"])


# --- the prefix cache ---


def cached(events: list[Event]) -> int:
    return events[-1].usage.cached


def test_a_common_prefix_is_cached_for_its_adapter_alone(engine: Engine, reference: Reference) -> None:
    shared, ends = prompt(14, 64), (prompt(15, 9), prompt(16, 5))
    first = run(engine, ask("a", shared + ends[0], "two"))["a"]
    events = run(
        engine,
        ask("same", shared + ends[1], "two"),
        ask("base", shared + ends[1]),
        ask("other", shared + ends[1], "one"),
        ask("short", shared[:30], "two"),
    )
    # Whole blocks of four tokens, and never the whole prompt.
    assert [cached(first), *(cached(events[name]) for name in ("same", "base", "other", "short"))] == [0, 64, 0, 0, 28]
    assert tokens(first) == reference("two", shared + ends[0])
    assert tokens(events["same"]) == reference("two", shared + ends[1])
    assert tokens(events["base"]) == reference(None, shared + ends[1])
    assert tokens(events["other"]) == reference("one", shared + ends[1])
    assert tokens(events["short"]) == reference("two", shared[:30])
    assert engine.stats().cached_tokens == 92


def test_an_answer_can_be_gone_on_with(engine: Engine, reference: Reference) -> None:
    """A chat's next turn begins with the last one's prompt and answer: both are cached."""
    answer = tokens(run(engine, ask("a", prompt(17, 30), "two", max_tokens=16))["a"])
    again = (*prompt(17, 30), *answer, *prompt(18, 3))
    events = run(engine, ask("b", again, "two"))["b"]
    assert cached(events) == 44  # the last token of an answer is never computed
    assert tokens(events) == reference("two", again)


def test_a_prefix_cache_can_be_off(engine_of: Callable[..., Engine], reference: Reference) -> None:
    engine = engine_of(prefix_cache=False)
    for name in "ab":
        events = run(engine, ask(name, prompt(14, 40)))[name]
        assert cached(events) == 0 and tokens(events) == reference(None, prompt(14, 40))
    assert engine.stats().pool_pages == {"kv": 0, "cache": 0, "adapter": 0, "free": engine.pages.total - 1}


# --- soft prompts ---


def with_prefix(prefix: np.ndarray, asked: tuple[int, ...], count: int) -> list[int]:
    """Greedy, by transformers, behind embeddings of one's own."""
    model = hf_base()[0]
    embed = model.get_input_embeddings()
    answer: list[int] = []
    with torch.no_grad():
        for _ in range(count):
            known = embed(torch.tensor([[*asked, *answer]]))
            inputs = torch.cat([torch.tensor(prefix, dtype=torch.float32)[None], known], dim=1)
            answer.append(int(model(inputs_embeds=inputs).logits[0, -1].argmax()))
    return answer


def test_prompt_tuning_is_pefts(engine: Engine, shelf: Path) -> None:
    asked = [prompt(20, length) for length in (1, 11, 40)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        theirs = PeftModel.from_pretrained(copy.deepcopy(hf_base()[0]), str(shelf / "soft")).eval()
    requests = [ask(f"{i}", each, "soft", logprobs=0, prompt_logprobs=0) for i, each in enumerate(asked)]
    again = [ask(f"again {i}", each, "soft") for i, each in enumerate(asked)]
    with compilations() as compiled:
        events = run(engine, *requests, ask("lora", prompt(20, 11), "two")) | run(engine, *again)
    assert not compiled
    for i, each in enumerate(asked):
        ids = [*each, *tokens(events[f"{i}"])]
        with torch.no_grad():
            expected = log_softmax(theirs(input_ids=torch.tensor([ids])).logits[0, 5:].float().numpy())
        assert ids[len(each) :] == expected[len(each) - 1 : -1].argmax(-1).tolist()
        assert tokens(events[f"again {i}"]) == ids[len(each) :]
        scores = [s.logprob for s in (events[f"{i}"][0].prompt_logprobs or ())[1:] if s is not None]
        np.testing.assert_allclose(scores, [expected[p - 1, ids[p]] for p in range(1, len(each))], atol=1e-4)
        assert events[f"{i}"][-1].usage[:3] == (len(each), 0, 8)
    # Soft tokens are cached with the prompt, and are no prompt tokens: 45 positions have 11 blocks, 44 - 5 tokens.
    assert cached(events["again 2"]) == 39


def mean_embedding(asked: tuple[int, ...]) -> np.ndarray:
    table = hf_base()[0].get_input_embeddings().weight.detach().numpy().astype(np.float64)
    mean = table[list(asked)].mean(0)
    return mean / np.sqrt((mean * mean).mean())


def lopa_prefix(directory: Path, vector: np.ndarray) -> np.ndarray:
    """arXiv 2405.15282 in numpy: shared * sigmoid(U V^T), U and V from the vector of the prompt."""
    weights = {
        name: value.astype(np.float64) for name, value in load_file(directory / "adapter_model.safetensors").items()
    }

    def head(name: str) -> np.ndarray:
        part = {
            key: next(v for k, v in weights.items() if name in k and k.endswith(key))
            for key in ("w1", "c1", "w2", "c2")
        }
        return np.tensordot(np.tanh(vector @ part["w1"] + part["c1"]), part["w2"], axes=1) + part["c2"]

    shared = next(value for name, value in weights.items() if name.split(".")[-1] == "prompt")
    return shared / (1 + np.exp(-head("rows") @ head("columns").T))


def test_lopa_is_the_papers(engine: Engine, shelf: Path) -> None:
    """Every prompt has soft tokens of its own; equal ones share their cached blocks, others do not."""
    asked = [prompt(21, 24), (*prompt(21, 24), 5), prompt(22, 70)]
    with compilations() as compiled:
        events = run(engine, *(ask(f"{i}", each, "lopa") for i, each in enumerate(asked)), ask("x", asked[0], "two"))
        events |= run(engine, ask("again", asked[0], "lopa"))
    assert not compiled
    for i, each in enumerate(asked):
        assert tokens(events[f"{i}"]) == with_prefix(lopa_prefix(shelf / "lopa", mean_embedding(each)), each, 8)
        assert cached(events[f"{i}"]) == 0
    assert tokens(events["again"]) == tokens(events["0"]) and cached(events["again"]) == 28 - 6


def test_an_encoder_reads_while_others_are_served(
    engine_of: Callable[..., Engine], shelf: Path, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits for a soft prompt waits alone, and has the prompt that the encoder's vector makes."""
    theirs, encoder = tiny_encoder("bert")
    method = jora.LoPA(prompt_tokens=6, rank=2, hidden=7, encoder=encoder)
    jora.save_adapter(randomised(method, base(), 11, 0.5), tmp_path / "adapters" / "read")
    jora.save_adapter(jora.load_adapter(shelf / "two", base()), tmp_path / "adapters" / "two")
    may_read, read, loaded = threading.Event(), BertEncoder.encode, []

    def slow(self: BertEncoder, texts: Sequence[str], *rest: Any) -> np.ndarray:
        assert may_read.wait(60)
        return read(self, texts, *rest)

    def load(self: BertEncoder) -> Any:
        loaded.append(self.path)
        return read_weights(self)

    read_weights = BertEncoder._read
    monkeypatch.setattr(BertEncoder, "encode", slow)
    monkeypatch.setattr(BertEncoder, "_read", load)
    engine = engine_of(Catalogue(tmp_path / "adapters", base().config, base().identity, encoders=[encoder]))
    asked = prompt(26, 12)
    engine.submit(ask("read", asked, "read", n=2))
    engine.submit(ask("gone", prompt(27, 12), "read"))
    engine.submit(ask("two", prompt(28, 9), "two"))
    others: list[Event] = []
    while engine.knows("two"):
        others += step(engine)
    assert tokens(others) == reference("two", prompt(28, 9)) and engine.knows("read")
    engine.cancel("gone")
    may_read.set()
    events = run(engine)
    text_of = base().tokenizer.decode(asked, skip_special_tokens=True)
    with torch.no_grad():
        vector = theirs(**tokenizer("bert")(text_of, return_tensors="pt")).last_hidden_state[0, 0].numpy()
    expected = with_prefix(lopa_prefix(tmp_path / "adapters" / "read", vector), asked, 8)
    assert tokens(events["read"]) == tokens(events["read"], 1) == expected
    assert tokens(run(engine, ask("again", asked, "read"))["again"]) == expected
    assert loaded == [Path(encoder)]  # two prompts, one load


def test_rows_of_the_base_alone_do_not_pay_for_adapters_that_ran_before(
    engine: Engine, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks: list[int] = []

    def counting(params: Any, active: Active, *rest: Any, **options: Any) -> Any:
        ranks.append(active.ranks)
        return decode(params, active, *rest, **options)

    monkeypatch.setattr(executor, "decode", counting)
    asked = prompt(29, 9)
    with compilations() as compiled:
        adapted = run(engine, ask("adapted", asked, "two"))["adapted"]
        assert set(ranks) == {8}
        ranks.clear()
        assert tokens(run(engine, ask("base", asked))["base"]) == reference(None, asked)
        assert set(ranks) == {0}
        again = run(engine, ask("again", prompt(30, 9), "two"))["again"]
    assert not compiled
    assert tokens(adapted) == reference("two", asked) and tokens(again) == reference("two", prompt(30, 9))


# --- grammars ---

SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["adapter", "base"]},
        "rank": {"type": "integer", "minimum": 1, "maximum": 64},
        "on": {"type": "boolean"},
    },
    "required": ["kind", "rank", "on"],
    "additionalProperties": False,
}


def test_a_schema_is_kept_whatever_the_model_would_say(engine: Engine, reference: Reference) -> None:
    grammar = Grammars(base().tokenizer, VOCAB, (EOS,)).compile("json_schema", json.dumps(SCHEMA))
    options = dict(grammar=grammar, max_tokens=100, ignore_eos=False)
    with compilations() as compiled:
        events = run(
            engine,
            ask("greedy", prompt(23, 20), "two", **options),
            ask("drawn", prompt(24, 5), **{**options, "temperature": 1.0, "n": 3, "seed": 0}),
            ask("free", prompt(25, 8), "one"),
        )
    assert not compiled
    answers = [text(events["greedy"]), *(text(events["drawn"], index) for index in range(3))]
    for answer in answers:
        assert jsonschema_rs.is_valid(SCHEMA, json.loads(answer)), answer
    assert len(set(answers[1:])) > 1
    assert tokens(events["free"]) == reference("one", prompt(25, 8))


def test_a_grammar_that_grows_too_complex_ends_its_request_alone(engine: Engine, reference: Reference) -> None:
    class Broken:
        def start(self) -> Broken:
            return self

        finished = False
        count = 0

        def mask(self) -> np.ndarray:
            self.count += 1
            if self.count == 3:
                raise InputError("the grammar cannot go on: too many items")
            return np.full(9, 0xFFFFFFFF, np.uint32)

        def advance(self, token: int) -> None:
            pass

    events = run(engine, ask("broken", prompt(1, 4), grammar=Broken()), ask("other", prompt(1, 9), "two"))
    assert (events["broken"][-1].finish, len(tokens(events["broken"]))) == ("error", 2)
    assert "too many items" in (events["broken"][-1].error or "")
    assert tokens(events["other"]) == reference("two", prompt(1, 9))


# --- fairness ---


def served_apart(engine: Engine) -> float:
    """The largest difference of two clients' service while both wait: one sends many and long requests."""
    for i in range(30):
        engine.submit(
            ask(f"many {i}", prompt(i, 40), max_tokens=12).__class__(
                f"many {i}", prompt(i, 40), ask("", (1,), max_tokens=12).sampling, None, "many"
            )
        )
    for i in range(15):
        request = ask(f"few {i}", prompt(100 + i, 6), max_tokens=6)
        engine.submit(request.__class__(request.id, request.prompt, request.sampling, None, "few"))
    furthest = 0.0
    while True:
        step(engine)
        waiting = {sequence.client for sequence in engine.scheduler._queue}
        if waiting != {"many", "few"}:
            return furthest
        service = engine.stats().service
        furthest = max(furthest, abs(service.get("many", 0.0) - service.get("few", 0.0)))


def test_backlogged_clients_are_served_alike(engine_of: Callable[..., Engine]) -> None:
    bound = 2 * max(40, 2 * OPTIONS.max_batch * 12)  # 2 U of arXiv 2401.00588: prompts weigh 1 a token, answers 2
    assert served_apart(engine_of()) <= bound
    assert served_apart(engine_of(scheduler="fcfs")) > bound


def test_the_shelf_has_one_name_an_adapter(engine: Engine) -> None:
    assert sorted(info.name for info in engine.adapters()) == sorted(ADAPTERS)


def test_a_prompt_put_back_half_way_is_scored_once(engine_of: Callable[..., Engine]) -> None:
    asked = ask("scored", prompt(7, 130), prompt_logprobs=0, max_tokens=3)
    expected = run(engine_of(), asked)["scored"]
    engine = engine_of(pages=86, optimistic=True)  # beside the three, room for the prompt and two blocks
    for i in range(3):
        engine.submit(ask(f"{i}", prompt(i, 4), max_tokens=60))
    while [s.state for s in engine._live] != ["running"] * 3:
        step(engine)
    engine.submit(asked)
    [sequence] = engine._by_request["scored"]
    begun, events = 0, []
    while engine.has_work:
        events += [event for event in step(engine) if event.request == "scored"]
        if not sequence.epoch:
            begun = max(begun, sequence.computed)
    assert sequence.epoch and 0 < begun < 130  # put back in prefill
    scores, wanted = events[0].prompt_logprobs, expected[0].prompt_logprobs
    assert scores is not None and wanted is not None and len(scores) == 130
    assert [score and score.token for score in scores] == [score and score.token for score in wanted]
    assert tokens(events) == tokens(expected)


def test_a_hit_is_an_adapter_that_nobody_has_to_read(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of()
    run(engine, ask("a", prompt(1, 4), "one"))
    run(engine, ask("b", prompt(1, 4), "one"))
    engine.host.fetch(engine.catalogue.resolve("two"))  # in host memory, not in the pool
    run(engine, ask("c", prompt(1, 4), "two"))
    assert (engine.stats().adapter_hits, engine.stats().adapter_misses) == (2, 1)
