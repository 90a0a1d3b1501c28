"""The training loop: what it writes, how it stops, and that neither padding nor accumulation changes the result."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from tests.tiny import tiny
from tests.train.conftest import METHOD, OPTIONS, Reporter, assert_same, examples, factors, losses, options

import jora.train
from jora.cli import train_command
from jora.cli.options import read_options
from jora.errors import InputError
from jora.methods.method import Adapter
from jora.methods.storage import load_adapter
from jora.models.model import Model, load_model
from jora.train import train
from jora.train.checkpoints import Checkpoints
from jora.train.examples import digest, load_examples
from jora.train.loop import Run
from jora.train.many.jobs import Job
from jora.train.options import TrainOptions


def mean_loss(model: Model, adapter: Any, data: Any) -> float:
    """Mean -log p of the answer tokens, from the full logits."""
    nll = []
    for example in data:
        logits = model(jnp.asarray(example.tokens)[None], adapter)[0]
        scores = jax.nn.log_softmax(logits)[jnp.arange(len(example.tokens) - 1), example.tokens[1:]]
        nll += [-float(s) for s, counts in zip(scores, example.loss[1:], strict=True) if counts]
    return sum(nll) / len(nll)


@pytest.fixture
def compilations() -> Any:
    """A list that grows by one with every program that XLA compiles."""
    found: list[str] = []

    def listen(name: str, seconds: float, **_: Any) -> None:
        if name == "/jax/core/compile/backend_compile_duration":
            found.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def test_run_directory(model: Model, tmp_path: Path) -> None:
    reporter = Reporter()
    data, held_out = examples(10), examples(4, seed=5)
    result = jora.train(
        model,
        METHOD,
        data,
        out=tmp_path / "run",
        options=options(max_steps=None, epochs=2),
        eval_data=held_out,
        reporter=reporter,
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines == result.history
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, result.steps + 1))
    assert sum(line["tokens"] for line in steps) == 2 * sum(len(e.tokens) for e in data)
    assert sum(line["answer_tokens"] for line in steps) == 2 * sum(int(e.loss.sum()) for e in data)
    keys = {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "answer_tokens"}
    assert set(steps[0]) == keys | {"tokens_per_s", "memory_bytes", "seconds"}
    assert steps[0]["learning_rate"] == pytest.approx(0.03)
    assert all(line["memory_bytes"] > 0 and line["tokens_per_s"] > 0 for line in steps)
    evaluations = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [result.steps // 2, result.steps]
    assert evaluations[0]["eval_answer_tokens"] == sum(int(e.loss.sum()) for e in held_out)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["model"] == model.path and config["rank"] == 4
    # The file starts the same run again.
    chosen = read_options(train_command.Options, ["--config", str(tmp_path / "run" / "config.yaml"), "--data=x"], "")
    assert chosen.training == options(max_steps=None, epochs=2)
    assert chosen.build_method() == METHOD
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").exists()
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    assert not reporter.stack
    with pytest.raises(InputError, match="holds a run already"):
        train(model, METHOD, data, out=tmp_path / "run", options=OPTIONS)


def test_training_lowers_the_loss_and_leaves_the_base(model: Model, adapter: Adapter, tmp_path: Path) -> None:
    before = jax.tree.map(np.asarray, model.params)
    result = train(model, adapter, examples(4), out=tmp_path / "run", options=OPTIONS)
    assert losses(result)[-1] < 0.8 * losses(result)[0]
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(model.params), strict=True):
        np.testing.assert_array_equal(old, new)


def test_jsonl_through_the_tokenizer(model: Model, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "what", "is", "up", "down", "the", "answer"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    reading = dataclasses.replace(model, _tokenizer=fast)
    file = tmp_path / "train.jsonl"
    lines = [{"prompt": "what is up ", "completion": "the answer"}, {"prompt": "what is down ", "completion": "up"}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    reporter = Reporter()
    by_file = load_examples(file, reading, OPTIONS, reporter, "training data")
    assert [int(example.loss.sum()) for example in by_file] == [3, 2]  # the completion, and its end
    assert digest(by_file) == digest(load_examples(lines, reading, OPTIONS, reporter, "training data"))
    assert reporter.notes[0].startswith("training data: 2 examples")
    with pytest.raises(InputError, match="no example fits in max_length 3"):
        load_examples(lines, reading, options(max_length=3), reporter, "training data")


def test_accumulation_equals_the_large_batch(model: Model, adapter: Adapter, tmp_path: Path) -> None:
    # 1 to 6 answer tokens an example: the micro-batches have unequal numbers of them.
    data = examples(16)
    large = options(batch_size=8, max_steps=3)
    small = options(batch_size=2, accumulation=4, max_steps=3)
    a = train(model, adapter, data, out=tmp_path / "large", options=large)
    b = train(model, adapter, data, out=tmp_path / "small", options=small)
    assert [line["answer_tokens"] for line in a.history] == [line["answer_tokens"] for line in b.history]
    np.testing.assert_allclose(losses(a), losses(b), rtol=1e-5)
    assert_same(a, b, 1e-4)  # AdamW divides tiny gradients by their own size


def test_rows_added_for_the_mesh_change_nothing(tmp_path: Path) -> None:
    directory = tiny("llama2")[1]
    results = []
    for mesh in (None, "data=2,fsdp=2,tensor=2"):
        model = load_model(directory, dtype="float32", mesh=mesh)
        chosen = options(batch_size=3, max_steps=3)  # the mesh needs four rows
        results.append(train(model, METHOD, examples(7), out=tmp_path / str(mesh), options=chosen))
    np.testing.assert_allclose(losses(results[0]), losses(results[1]), rtol=1e-5)
    assert_same(results[0], results[1], 1e-4)


def test_no_compilation_after_the_first_step(tmp_path: Path, compilations: list[str]) -> None:
    model = load_model(tiny("llama2")[1], dtype="float32", mesh="fsdp=2,tensor=2")
    counts: list[int] = []
    reporter = Reporter(lambda step: counts.append(len(compilations)))
    # Two row lengths, three epochs, and evaluations between them.
    data = [*examples(8, shortest=8, longest=8), *examples(4, seed=1)]
    chosen = options(epochs=3, max_steps=None, save_every=1)
    held_out = examples(4, seed=2)
    train(model, METHOD, data, out=tmp_path / "run", options=chosen, eval_data=held_out, reporter=reporter)
    assert len(counts) == 9
    # Step 2 is read before the second checkpoint: what orbax compiles for its first one is done by then.
    assert 0 < counts[1] == counts[-1]


def test_an_equal_run_compiles_nothing_again(
    model: Model, adapter: Adapter, tmp_path: Path, compilations: list[str]
) -> None:
    for seed in (1, 2):
        compilations.clear()
        train(model, adapter, examples(8), out=tmp_path / str(seed), options=options(seed=seed))
    assert not compilations


def test_best_evaluation_is_the_result(model: Model, adapter: Adapter, tmp_path: Path) -> None:
    # Random data: learning some of it by heart makes the rest less likely.
    reporter = Reporter()
    chosen = options(eval_every=1, patience=2)
    held_out = examples(4, seed=9)
    result = train(
        model, adapter, examples(4), out=tmp_path / "run", options=chosen, eval_data=held_out, reporter=reporter
    )
    evaluations = {line["step"]: line["eval_loss"] for line in result.history if "eval_loss" in line}
    assert result.best_loss == min(evaluations.values())
    assert evaluations[result.best_step or 0] == result.best_loss
    assert result.steps == (result.best_step or 0) + 2 < 6
    assert any("no better evaluation in 2" in note for note in reporter.notes)
    # The adapter is that step's, on disk too: evaluating it gives the best loss at once.
    assert result.best_step in Checkpoints(tmp_path / "run" / "checkpoints", 2).steps()
    found = load_adapter(tmp_path / "run" / "adapter", model)
    for each in (result.adapter, found):
        np.testing.assert_allclose(mean_loss(model, each, held_out), result.best_loss, rtol=1e-5)


def test_stops_at_a_loss_that_is_not_finite(model: Model, adapter: Adapter, tmp_path: Path) -> None:
    params = dataclasses.replace(model.params, final_norm=model.params.final_norm.at[3].set(jnp.nan))
    broken = dataclasses.replace(model, params=params)
    with pytest.raises(InputError, match=r"step 1: the loss is nan .*lower learning_rate .*no checkpoint"):
        train(broken, adapter, examples(8), out=tmp_path / "run", options=OPTIONS)
    assert not (tmp_path / "run" / "adapter").exists()


def test_diverging_keeps_the_last_good_checkpoint(
    model: Model, adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_step = Run._step

    def poisoned(run: Run) -> None:
        if run.progress.step == 4:
            run.params = dataclasses.replace(run.params, final_norm=run.params.final_norm * jnp.nan)
        take_step(run)

    monkeypatch.setattr(Run, "_step", poisoned)
    with pytest.raises(InputError, match=r"step 5: the loss is nan .*the last checkpoint is .*step-00000004"):
        chosen = options(save_every=4)
        train(model, adapter, examples(4), out=tmp_path / "run", options=chosen)
    assert Checkpoints(tmp_path / "run" / "checkpoints", 2).steps() == [4]


def test_trains_an_adapter_further_and_leaves_it_usable(model: Model, adapter: Adapter, tmp_path: Path) -> None:
    first = train(model, adapter, examples(4), out=tmp_path / "first", options=OPTIONS)
    kept = factors(first.adapter)
    second = train(model, first.adapter, examples(4), out=tmp_path / "second", options=OPTIONS)
    assert losses(second)[0] < losses(first)[0]
    for name, value in factors(first.adapter).items():  # its arrays were not donated
        np.testing.assert_array_equal(value, kept[name])


def test_a_directory_of_an_adapter_is_trained_further_and_recorded(model: Model, tmp_path: Path) -> None:
    first = train(model, METHOD, examples(4), out=tmp_path / "first", options=OPTIONS)
    start = tmp_path / "first" / "adapter"
    second = train(model, start, examples(4), out=tmp_path / "second", options=OPTIONS)
    assert losses(second) == losses(train(model, first.adapter, examples(4), out=tmp_path / "third", options=OPTIONS))
    written = yaml.safe_load((tmp_path / "second" / "config.yaml").read_text())
    assert written["adapter"] == str(start) and not {"method", "rank"} & written.keys()  # its own options hold


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_saves_and_says_how_to_go_on(
    number: signal.Signals, model: Model, adapter: Adapter, tmp_path: Path
) -> None:
    reporter = Reporter(lambda step: signal.raise_signal(number) if step == 2 else None)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        train(model, adapter, examples(8), out=tmp_path / "run", options=OPTIONS, reporter=reporter)
    assert signal.getsignal(number) is before
    # Metrics are read a step late: the third step was under way.
    assert Checkpoints(tmp_path / "run" / "checkpoints", 2).steps() == [3]
    assert "interrupted after step 3" in reporter.notes[-1] and "resume" in reporter.notes[-1]
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_run_of_one_step_learns(model: Model, adapter: Adapter, tmp_path: Path) -> None:
    """Warm-up begins at a rate of 0, and there is no second step."""
    chosen = options(max_steps=1, warmup=0.03)
    result = train(model, adapter, examples(4), out=tmp_path, options=chosen)
    assert result.history[0]["learning_rate"] == chosen.learning_rate
    assert any(np.any(value) for name, value in factors(result.adapter).items() if "lora_B" in name or ".b" in name)


def test_examples_that_are_too_long(model: Model) -> None:
    data = examples(6)
    long = sum(len(e.tokens) > 20 for e in data)
    assert 0 < long < 6
    with pytest.raises(InputError, match=f"{long} of 6 examples have more than max_length 20"):
        load_examples(data, model, options(max_length=20), Reporter(), "training data")
    reporter = Reporter()
    kept = load_examples(data, model, options(max_length=20, too_long="drop"), reporter, "training data")
    assert [len(e.tokens) for e in kept] == [len(e.tokens) for e in data if len(e.tokens) <= 20]
    assert reporter.notes == [f"training data: 6 examples, {long} dropped as too long"]


def test_a_step_that_does_not_fit_is_refused_before_the_first(model: Model, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("jora.train.programs.free_bytes", lambda layout: 1 << 10)
    with pytest.raises(InputError, match=r"a training step does not fit: it needs .* GiB .*, 0\.0 GiB are free"):
        train(model, METHOD, examples(4), out=tmp_path / "run", options=OPTIONS)
    assert not (tmp_path / "run" / "config.yaml").exists()
    jobs = [Job(name="one", data=examples(4), method=METHOD, options=TrainOptions())]
    monkeypatch.setattr("jora.train.many.programs.free_bytes", lambda layout: 1 << 10)
    with pytest.raises(InputError, match="a training step does not fit"):
        jora.train_many(model, jobs, out=tmp_path / "many")


def test_a_token_outside_the_vocabulary_is_refused(model: Model) -> None:
    first, second = examples(2)
    second = second._replace(tokens=np.where(second.loss, model.config.vocab_size, second.tokens))
    with pytest.raises(InputError, match=r"training data: example 1 has a token outside .* \(0 to 98\)"):
        load_examples([first, second], model, OPTIONS, Reporter(), "training data")


def test_an_adapter_of_another_model_is_refused(model: Model, adapter: Adapter, tmp_path: Path) -> None:
    other = dataclasses.replace(adapter, config=dataclasses.replace(adapter.config, layers=9))
    with pytest.raises(InputError, match="the adapter was made for a llama 9 x"):
        train(model, other, examples(4), out=tmp_path / "run", options=OPTIONS)


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        ({"rank_pattern": {"q_prj": 8}}, "rank_pattern: 'q_prj' matches no adapted module"),
        ({"alpha_pattern": {"k_proj": 8.0}}, "alpha_pattern: 'k_proj' matches no adapted module"),
        ({"exclude_modules": ["o_proj"]}, "exclude_modules: 'o_proj' is none of the modules that targets"),
        ({"exclude_modules": r".*\.mlp\..*"}, "exclude_modules: '.*mlp.*' is none of the modules"),
    ],
)
def test_an_option_that_names_no_module_is_refused(model: Model, tmp_path: Path, chosen: dict, says: str) -> None:
    method = dataclasses.replace(METHOD, targets=("q_proj", "v_proj"), **chosen)
    with pytest.raises(InputError, match=says):
        train(model, method, examples(4), out=tmp_path / "run", options=OPTIONS)
    assert not (tmp_path / "run").exists()
    jobs = [Job(name="one", data=examples(4), method=method, options=TrainOptions())]
    with pytest.raises(InputError, match=says):
        jora.train_many(model, jobs, out=tmp_path / "many")


def test_options_that_name_modules_stand(model: Model, tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"self_attn.v_.*": 8.0}}
    method = dataclasses.replace(
        METHOD, targets="all-linear", exclude_modules=["up_proj", "1.mlp.gate_proj"], **patterns
    )
    train(model, method, examples(4), out=tmp_path / "run", options=options(max_steps=1))


def test_an_evaluation_that_is_not_finite_ends_the_run(model: Model, adapter: Adapter, tmp_path: Path) -> None:
    chosen = options(max_steps=1, learning_rate=3e38, warmup=0.0)
    with pytest.raises(InputError, match=r"step 1: the evaluation loss is .*: lower learning_rate"):
        train(model, adapter, examples(4), out=tmp_path / "run", options=chosen, eval_data=examples(4))


def test_a_directory_with_other_things_is_refused(model: Model, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="not empty and holds no run"):
        train(model, METHOD, examples(4), out=tmp_path, options=OPTIONS)
    with pytest.raises(InputError, match="no run to resume"):
        train(model, METHOD, examples(4), out=tmp_path / "new", options=options(resume=True))
