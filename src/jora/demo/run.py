"""The main job end to end: real model, real documents, questions -> data set -> adapter -> before and after."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from jora.demo import python_docs
from jora.demo.gemma import default_cache, gemma_gguf
from jora.errors import InputError
from jora.reporting import SILENT, Reporter

if TYPE_CHECKING:
    from jora.data.raft import RaftOptions, RaftSet
    from jora.inference.evaluate import EvalResult
    from jora.methods.lora import LoRA
    from jora.methods.method import Adapter
    from jora.models.model import Model
    from jora.train.options import TrainOptions

# Two slow cores, ten minutes: short contexts, short answers, one epoch, not all of the questions
# (`examples/python_docs.py` takes all of them).
MAX_LENGTH = 512
ANSWER_TOKENS = 80
QUESTIONS: dict[python_docs.Split, int] = {"train": 152, "heldout": 52}
EVAL_ROWS = 26  # answers at a time: two batches of the held-out questions
T = TypeVar("T")
MODEL_NAME = "gemma-3-270m-from-q4_k_m"


class Asked(NamedTuple):
    """One held-out question, with what base and tuned model made of it and its documents."""

    question: str
    reference: str
    documents: tuple[str, ...]  # titles
    base: str
    tuned: str


class DemoResult(NamedTuple):
    """What the demo measured and wrote."""

    before: EvalResult
    after: EvalResult
    asked: Asked
    adapter: Path
    data: Path


def run_demo(
    out: str | os.PathLike[str] = "jora-demo",
    *,
    limit: int | None = None,
    mesh: str | None = None,
    reporter: Reporter = SILENT,
) -> DemoResult:
    """Build a data set, evaluate the base, fine-tune a LoRA adapter, evaluate again, ask one question.

    Args:
        out: directory for the inputs, the data set and the run; each run replaces the last one's.
        limit: only so many questions for training and as many for evaluation.
        mesh: as for `load_model`.
        reporter: told of every stage.

    Raises:
        InputError: the demo's model is not installed, or `out` holds something else.
    """
    import jora

    out = Path(out).expanduser()
    if limit is not None and limit < 1:
        raise InputError(f"demo: limit must be at least 1, found {limit}")
    _check_out(out)
    reporter.note("1/6  the model: Gemma 3 270M")
    model = jora.load_model(prepare_model(reporter), mesh=mesh, reporter=reporter)
    reporter.note("2/6  the data: Python's own documentation, questions of this project")
    data, run = out / "data", out / "run"
    shutil.rmtree(run, ignore_errors=True)
    build_data(model, out / "inputs", data, limit, reporter)
    reporter.note("3/6  the base model answers the held-out questions")
    before = _evaluate(model, None, data, out / "before.jsonl", reporter)
    reporter.note("4/6  fine-tuning")
    method, options = recipe()
    adapter = jora.train(model, method, data / "train.jsonl", out=run, options=options, reporter=reporter).adapter
    reporter.note("5/6  the tuned model answers the same questions")
    after = _evaluate(model, adapter, data, out / "after.jsonl", reporter)
    reporter.note("6/6  one question to both")
    saved = jora.load_adapter(run / "adapter", model)  # what was written, not what is in memory
    number = _worth_asking(before, after)
    asked = ask(model, saved, data, number, before.rows[number].prediction, reporter)
    return DemoResult(before, after, asked, run / "adapter", data)


def _check_out(out: Path) -> None:
    """Raise InputError where `out` holds what no earlier demo wrote: it would be removed or overwritten."""
    from jora.data import raft
    from jora.train.record import CONFIG

    written = (python_docs.DOCUMENTS_FILE, python_docs.questions_file("train"))
    demo = all((out / "inputs" / name).is_file() for name in written)
    if out.exists() and any(out.iterdir()) and not demo:
        raise InputError(f"{out} holds something that is no demo: give another directory with --out")
    run = out / "run"
    if run.exists() and not (run / CONFIG).is_file():
        raise InputError(f"{run} is no run of a demo, it has no {CONFIG}: delete it or give another --out")
    raft.check_out(out / "data")


def prepare_model(reporter: Reporter = SILENT) -> Path:
    """The demo's model as a Hugging Face directory in the user's cache, converted on the first call."""
    from jora.models.convert import convert

    directory = default_cache() / MODEL_NAME
    if not (directory / "config.json").is_file():  # the directory appears when it is whole
        reporter.note("joining and checking the model's parts, once")
        convert(gemma_gguf(), directory, reporter=reporter)
    return directory


def raft_options() -> RaftOptions:
    """Small chunks, so that an oracle and its distractors fit in the demo's context."""
    from jora.data.raft import RaftOptions

    return RaftOptions(chunk_tokens=80, contexts=3, max_context_tokens=256)


def recipe() -> tuple[LoRA, TrainOptions]:
    """The adapter and how it is trained."""
    from jora.methods.lora import LoRA
    from jora.train.options import TrainOptions

    return LoRA(rank=16, alpha=32), TrainOptions(
        epochs=1, batch_size=4, learning_rate=5e-4, warmup=0.1, max_length=MAX_LENGTH
    )


def build_data(model: Model, inputs: Path, data: Path, limit: int | None, reporter: Reporter = SILENT) -> RaftSet:
    """Documents and questions as files in `inputs`, the RAFT data set in `data`."""
    from jora.data import raft
    from jora.data.documents import read_documents
    from jora.data.questions import read_questions

    asked = {}
    for split, most in QUESTIONS.items():
        counts = python_docs.write_inputs(inputs, split)
        resolved = read_questions(inputs / python_docs.questions_file(split))
        asked[split] = spread(resolved, most)[:limit]
        reporter.note(
            f"{split}: {counts.resolved} of {counts.asked} questions have their quote in this Python's docs; "
            f"{len(asked[split])} are asked"
        )
    documents = read_documents(inputs / python_docs.DOCUMENTS_FILE)
    built = raft.build_raft(documents, asked["train"], model.tokenizer, raft_options(), asked["heldout"])
    raft.write(built, data)
    for line in raft.report(built):
        reporter.note(line)
    return built


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most so many of them, evenly over the list: it goes from topic to topic."""
    count = min(most, len(items))
    return [items[number * len(items) // count] for number in range(count)]


def _evaluate(model: Model, adapter: Adapter | None, data: Path, out: Path, reporter: Reporter) -> EvalResult:
    import jora

    return jora.evaluate(
        model,
        data / "eval.jsonl",
        adapter,
        max_new_tokens=ANSWER_TOKENS,
        max_length=MAX_LENGTH + ANSWER_TOKENS,
        batch_size=EVAL_ROWS,
        out=out,
        reporter=reporter,
    )


def _worth_asking(before: EvalResult, after: EvalResult) -> int:
    """The question whose answer changed most: the table already says how the others fared."""
    gains = [new.f1 - old.f1 for old, new in zip(before.rows, after.rows, strict=True)]
    return max(range(len(gains)), key=gains.__getitem__)


def ask(
    model: Model, adapter: Adapter, data: Path, number: int, base_answer: str, reporter: Reporter = SILENT
) -> Asked:
    """Question `number` of the held-out set, answered from its documents; the base has answered it already."""
    import jora
    from jora.data.chat import fill_documents
    from jora.data.formats import read_examples

    example = read_examples(data / "eval.jsonl")[number]
    prompt = [turn for turn in fill_documents(example).messages if turn["role"] != "assistant"]
    return Asked(
        question=str(example.extra["question"]),
        reference=str(example.extra["answer"]),
        documents=tuple(document.title for document in example.documents or ()),
        base=base_answer,
        tuned=jora.generate(model, [prompt], adapter, max_new_tokens=ANSWER_TOKENS, reporter=reporter)[0],
    )
