"""`jora.evaluate`: loss, exact match, F1 and real quotes on held-out examples, with a row per example."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jora.data import raft_format
from jora.data.batches import Batches, BatchOptions, Tokenised, prompt_of
from jora.data.chat import Template, fill_documents, tokenise_example
from jora.data.formats import Example, read_examples
from jora.data.tokenise import tokenise_prompt
from jora.errors import InputError
from jora.files import atomic_write, check_no_directory
from jora.inference.decode import Program, bind, ready, weights
from jora.inference.ends import end_tokens
from jora.inference.metrics import score
from jora.inference.tokens import generate_and_score
from jora.kernels import gpu_compiler
from jora.methods.method import Adapter, State
from jora.models import decoder
from jora.models.head import Answers, answer_loss
from jora.models.model import Model
from jora.models.params import Params
from jora.reporting import SILENT, Reporter


@dataclass(frozen=True)
class EvalRow:
    """One example: what was asked, what the model wrote, and its scores. `loss` is nats per answer token."""

    where: str
    question: str
    prediction: str
    answer: str
    references: tuple[str, ...]
    loss: float
    answer_tokens: int
    exact_match: float
    f1: float
    quotes: int
    quotes_found: int
    answered: bool


@dataclass(frozen=True)
class EvalResult:
    """Means over a data set, in [0, 1] but for the loss.

    loss: nats per answer token, teacher-forced, over all answer tokens. quote_share: quotes that stand word
    for word in the prompt's documents among all quotes; None where nothing was quoted. answered: predictions
    that reach an answer ("##Answer:" where the reference has it, else any text).
    """

    loss: float
    exact_match: float
    f1: float
    quote_share: float | None
    answered: float
    rows: tuple[EvalRow, ...]

    def metrics(self) -> dict[str, float | int | None]:
        """The numbers without the rows."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "rows"}
        return {"examples": len(self.rows), **values}


@dataclass(frozen=True)
class _Loss:
    """Nats, summed over answer tokens, and how many these are."""

    nats: float = 0.0
    tokens: int = 0

    @classmethod
    def of(cls, nll: np.ndarray) -> _Loss:
        return cls(float(nll.sum(dtype=np.float64)), len(nll))

    def __add__(self, other: _Loss) -> _Loss:
        return _Loss(self.nats + other.nats, self.tokens + other.tokens)


class _Prepared(NamedTuple):
    """An example as it is used: its documents shortened, its prompt, and its turns with their answers.

    reference: the turn whose first answer is that of the prompt, scored as the prompt is read. turns: the others, as
    of a conversation with several answers: what training makes its soft prompt of ends earlier there.
    """

    example: Example
    prompt: list[int]
    reference: Tokenised | None
    turns: list[Tokenised]


def evaluate(
    model: Model,
    data: str | os.PathLike[str] | Sequence[Example],
    adapter: Adapter | None = None,
    *,
    max_new_tokens: int = 128,
    max_length: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    out: str | os.PathLike[str] | None = None,
    reporter: Reporter = SILENT,
) -> EvalResult:
    """Answer every example greedily, and score answers and loss.

    Args:
        model: the base.
        data: a JSONL file of `jora raft build` or of any training format, or the examples.
        adapter: applied if given.
        max_new_tokens: most tokens of a generated answer.
        max_length: most tokens of prompt and generated answer (default: the model's positions). Longer
            prompts lose document text, the oracle's last; the loss sees the same documents.
        limit: only the first so many examples.
        batch_size: rows on the devices at a time.
        out: a JSONL file for one line an example.

    Raises:
        InputError: unreadable data, an example without an answer, or a prompt that cannot be shortened.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, found {limit}")
    if out is not None:
        check_no_directory(out)
    whole = list(data) if isinstance(data, Sequence) and not isinstance(data, str) else read_examples(data)
    examples = whole[:limit]
    template = Template(model.tokenizer)
    adapter = ready(model, adapter)
    longest = min(max_length or model.config.max_positions, model.config.max_positions)
    if adapter is not None:
        longest -= adapter.method.prompt_slots
    if longest <= max_new_tokens:
        raise InputError(f"max_length {longest} leaves no room for a prompt beside max_new_tokens {max_new_tokens}")
    prepared = [_prepare(example, template, longest - max_new_tokens) for example in examples]
    if shortened := sum(p.example is not e for p, e in zip(prepared, examples, strict=True)):
        reporter.note(f"{shortened} of {len(examples)} prompts shortened in their documents to {longest} tokens")
    texts, losses = _answered(model, prepared, adapter, template, max_new_tokens, batch_size, reporter)
    rows = [_row(p.example, text, loss) for p, text, loss in zip(prepared, texts, losses, strict=True)]
    result = _summarise(rows, losses)
    if out is not None:
        with atomic_write(out) as temporary:
            text = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in result.rows)
            temporary.write_text(text, encoding="utf-8", newline="\n")
    return result


def _prepare(example: Example, template: Template, prompt_limit: int) -> _Prepared:
    _references(example)
    prompt, used = tokenise_prompt(example, template, max_length=prompt_limit)
    *turns, last = tokenise_example(used, template)
    if np.array_equal(prompt_of(last), prompt):
        return _Prepared(used, prompt.tolist(), last, turns)
    return _Prepared(used, prompt.tolist(), None, [*turns, last])


def _references(example: Example) -> tuple[str, ...]:
    """The answers that count as right: the field `answer` (one or a list), or the assistant's last turn."""
    given = example.extra.get("answer", example.answer)
    references = tuple(given) if isinstance(given, list) else (given,)
    if not all(isinstance(r, str) and r.strip() for r in references) or not references:
        raise InputError(f"{example.where}: no answer to compare with: give `answer` or an assistant turn")
    return references


def _question(example: Example) -> str:
    if isinstance(question := example.extra.get("question"), str):
        return question
    asked = [m["content"] for m in example.messages if m["role"] == "user"]
    return asked[-1] if asked else example.prompt


def _row(example: Example, text: str, loss: _Loss) -> EvalRow:
    references = _references(example)
    scores = score(text, references, _texts_in_prompt(example))
    marked = raft_format.ANSWER in example.answer
    return EvalRow(
        where=example.where,
        question=_question(example),
        prediction=text,
        answer=scores.answer,
        references=references,
        loss=loss.nats / loss.tokens,
        answer_tokens=loss.tokens,
        exact_match=scores.exact_match,
        f1=scores.f1,
        quotes=scores.quotes,
        quotes_found=scores.quotes_found,
        answered=bool(scores.answer) and (raft_format.ANSWER in text or not marked),
    )


def _texts_in_prompt(example: Example) -> list[str]:
    """Where a quote may stand: the documents, or all of the prompt where they are not kept apart."""
    if example.documents is not None:
        return [document.text for document in example.documents]
    filled = fill_documents(example)
    return [filled.prompt, *(m["content"] for m in filled.messages if m["role"] != "assistant")]


def _summarise(rows: list[EvalRow], losses: list[_Loss]) -> EvalResult:
    def mean(name: str) -> float:
        return sum(float(getattr(row, name)) for row in rows) / len(rows)

    quotes = sum(row.quotes for row in rows)
    return EvalResult(
        loss=sum(loss.nats for loss in losses) / sum(loss.tokens for loss in losses),
        exact_match=mean("exact_match"),
        f1=mean("f1"),
        quote_share=sum(row.quotes_found for row in rows) / quotes if quotes else None,
        answered=mean("answered"),
        rows=tuple(rows),
    )


def _answered(
    model: Model,
    prepared: list[_Prepared],
    adapter: Adapter | None,
    template: Template,
    max_new_tokens: int,
    batch_size: int,
    reporter: Reporter,
) -> tuple[list[str], list[_Loss]]:
    """What the model writes after each prompt, and the loss of the examples' own answers."""
    alone = _losses(model, prepared, adapter, batch_size, reporter)
    found = generate_and_score(
        model,
        [p.prompt for p in prepared],
        adapter,
        [p.reference for p in prepared],
        ends=end_tokens(model, template),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        reporter=reporter,
    )
    texts = [template.tokenizer.decode(each.tokens, skip_special_tokens=True) for each in found]
    return texts, [own + _Loss.of(each.nll) for own, each in zip(alone, found, strict=True)]


def _losses(
    model: Model, prepared: list[_Prepared], adapter: Adapter | None, batch_size: int, reporter: Reporter
) -> list[_Loss]:
    """Of each example's turns that are not read with its prompt."""
    turns = [turn for p in prepared for turn in p.turns]
    if not turns:
        return [_Loss()] * len(prepared)
    origins = [index for index, p in enumerate(prepared) for _ in p.turns]
    method, state = model.parts_of(adapter)
    reserved = 0 if method is None else method.prompt_slots
    options = BatchOptions(
        rows=min(batch_size, len(turns)),
        max_length=reserved + max(len(turn.tokens) for turn in turns),
        row_multiple=model.layout.batch_shards,
        shuffle=False,
        prompt_slots=reserved,
    )
    prompts = [prompt_of(turn).tolist() for turn in turns]
    instances = None if method is None else method.instances(model, prompts, reporter=reporter)
    batches = Batches(turns, options, instances=instances)
    program = Program(model.config, model.layout, method)
    totals, counts = np.zeros(len(prepared)), np.zeros(len(prepared), int)
    reporter.start(len(turns), "evaluating the loss, examples")
    done = 0
    for step in batches.plan(0):
        (batch,) = batches.build(step)
        answers = Answers(*map(jnp.asarray, (batch.answer_positions, batch.answer_targets, batch.answer_weights)))
        own = batches.instances_of(step)
        instance = None if own is None else own[0]
        found = _answer_nll(model.params, state, batch.tokens, answers, instance, program=program)
        nll = np.asarray(found, np.float64)
        for row, (turn,) in enumerate(step.rows):
            totals[origins[turn]] += float((nll[row] * batch.answer_weights[row]).sum())
            counts[origins[turn]] += int(batch.answer_weights[row].sum())
        done += len(step.rows)
        reporter.update(done)
    reporter.finish(loss=float(totals.sum() / counts.sum()))
    return [_Loss(nats, count) for nats, count in zip(totals.tolist(), counts.tolist(), strict=True)]


@partial(jax.jit, static_argnames="program", compiler_options=gpu_compiler.OPTIONS)
def _answer_nll(
    params: Params,
    state: State | None,
    tokens: Int[Array, "b s"],
    answers: Answers,
    instance: Float[Array, "b h"] | None,
    *,
    program: Program,
) -> Float[Array, "b n"]:
    """-log p of each answer token; rows are single sequences, padded on the right."""
    config, layout, _ = program
    bound, rows = bind(program, state, instance)
    params = weights(program, state, params)
    tokens = layout.constrain(tokens, "batch", None)
    hidden, _ = decoder.forward(params, config, layout, tokens, bound=bound, rows=rows)
    return answer_loss(params, config, layout, hidden, answers, bound, rows)[1]
