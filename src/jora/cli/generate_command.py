"""`jora generate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jora.cli.checks import check_at_least_one, check_file, check_names, check_out_file
from jora.cli.common import ModelOptions, json_lines, open_adapter, open_model, write_out
from jora.errors import InputError
from jora.reporting import Reporter

if TYPE_CHECKING:
    from jora.data.formats import Example


@dataclass(frozen=True, kw_only=True)
class Options(ModelOptions):
    """Answer one prompt, or a file of prompts."""

    adapter: str | None = None
    """An adapter directory; without it the base answers."""
    prompt: str | None = None
    """One prompt."""
    prompts: str | None = None
    """A file: .jsonl in a training format (answers in it are not shown to the model), or a prompt a line."""
    out: str | None = None
    """Where the answers go, a JSON object a line; standard output by default."""
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

    if options.prompt is not None and options.prompts is not None:
        raise InputError("jora generate: give --prompt TEXT or --prompts FILE, not both")
    if options.prompt is not None:
        if not options.prompt.strip():
            raise InputError("jora generate: --prompt is empty: give a text")
        return [conversation(options.prompt)]
    if options.prompts is None:
        raise InputError("jora generate: give --prompt TEXT or --prompts FILE")
    check_file("--prompts", options.prompts)
    path = Path(options.prompts).expanduser()
    if path.suffix == ".jsonl":
        from jora.data.formats import read_examples

        return [_from_example(example) for example in read_examples(path)]
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not where str.splitlines ends lines as well
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a text file in UTF-8 ({error.reason})") from error
    prompts = [conversation(line) for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"{path}: no prompt in this file: write one a line")
    return prompts


def _check(options: Options) -> None:
    check_at_least_one(options, "max_new_tokens", "batch_size")
    if options.seed < 0:
        raise InputError(f"--seed must be at least 0, found {options.seed}")
    check_out_file(options.out)
    import jax

    from jora.inference.sampling import sampling_rows

    # As shapes alone: real arrays would start jax before the devices of --mesh are made.
    jax.eval_shape(lambda: sampling_rows(1, options.temperature, options.top_k, options.top_p, options.min_p))
    check_names(options.model, options.adapter)


def run(options: Options, reporter: Reporter) -> None:
    """Read the prompts, check, load, generate, print."""
    prompts = _read_prompts(options)
    _check(options)
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
    if options.prompts is None and options.out is None:
        print(answers[0])
        return
    text = json_lines({"prompt": p, "answer": a} for p, a in zip(prompts, answers, strict=True))
    if options.out is None:
        print(text, end="")
        return
    write_out(options.out, text)
    reporter.note(f"{len(answers)} answers written to {options.out}")
