"""`jora generate`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jora.cli.common import ModelOptions, open_adapter, open_model
from jora.errors import InputError
from jora.files import atomic_write
from jora.reporting import Reporter

if TYPE_CHECKING:
    from jora.data.formats import Example


@dataclass(frozen=True, kw_only=True)
class Options(ModelOptions):
    """Answer one prompt, or a file of prompts."""

    adapter: str | None = None
    """An adapter directory; without it the base answers."""
    prompt: str | None = None
    """One prompt; the answer goes to standard output."""
    prompts: str | None = None
    """A file: .jsonl in a training format (answers in it are not shown to the model), or a prompt a line."""
    out: str | None = None
    """Where the answers to `prompts` go, a JSON object a line; standard output by default."""
    plain: bool = False
    """Take prompts as they are, without the model's chat template."""
    max_new_tokens: int = 128
    """Most tokens of an answer."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Keep the likeliest tokens up to this probability mass."""
    top_k: int = 0
    """Keep this many of the likeliest tokens; 0 keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest's probability."""
    seed: int = 0
    """The same seed gives the same answers."""
    stop: tuple[str, ...] = ()
    """An answer ends before the first of these."""
    batch_size: int = 8
    """Prompts on the devices at a time."""


def _from_example(example: Example) -> Any:
    """The prompt of a training example: all before the last answer."""
    from jora.data.chat import fill_documents

    filled = fill_documents(example)
    if not filled.messages:
        return filled.prompt
    last = len(filled.messages) - (filled.messages[-1]["role"] == "assistant")
    return list(filled.messages[:last])


def _read_prompts(options: Options) -> list[Any]:
    def conversation(text: str) -> Any:
        return text if options.plain else [{"role": "user", "content": text}]

    if (options.prompt is None) == (options.prompts is None):
        raise InputError("jora generate: give --prompt TEXT or --prompts FILE")
    if options.prompt is not None:
        return [conversation(options.prompt)]
    path = Path(options.prompts or "")
    if path.suffix == ".jsonl":
        from jora.data.formats import read_examples

        return [_from_example(example) for example in read_examples(path)]
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a text file in UTF-8 ({error.reason})") from error
    prompts = [conversation(line) for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"{path}: no prompt in this file: write one a line")
    return prompts


def run(options: Options, reporter: Reporter) -> None:
    """Read the prompts, load, generate, print."""
    prompts = _read_prompts(options)
    model = open_model(options, reporter)
    import jora

    answers = jora.generate(
        model,
        prompts,
        open_adapter(options.adapter, model),
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        min_p=options.min_p,
        seed=options.seed,
        stop=options.stop,
        batch_size=options.batch_size,
        reporter=reporter,
    )
    if options.prompts is None:
        print(answers[0])
        return
    rows = zip(prompts, answers, strict=True)
    text = "".join(json.dumps({"prompt": p, "answer": a}, ensure_ascii=False) + "\n" for p, a in rows)
    if options.out is None:
        print(text, end="")
        return
    with atomic_write(options.out) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    reporter.note(f"{len(answers)} answers written to {options.out}")
