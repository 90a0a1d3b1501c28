"""`jora.generate`: text in, new text out (`jora.inference.tokens` has the same over tokens)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jora.data.chat import Template, fill_documents
from jora.data.formats import Message, parse_example
from jora.errors import InputError
from jora.inference.ends import end_tokens
from jora.inference.tokens import generate_tokens
from jora.methods.method import Adapter
from jora.models.model import Model
from jora.reporting import SILENT, Reporter

Chat = Sequence[Message]


def generate(
    model: Model,
    prompts: str | Sequence[str | Chat] | Chat,
    adapter: Adapter | None = None,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int = 0,
    stop: str | Sequence[str] | None = None,
    batch_size: int = 8,
    reporter: Reporter = SILENT,
) -> str | list[str]:
    """The text that the model writes after each prompt, without the prompt and special tokens.

    Args:
        model: the base.
        prompts: a string is taken as it is (BOS is added where the tokenizer adds it); a conversation, a
            list of {"role", "content"}, is written by the model's chat template. One prompt gives a
            string, a list of prompts a list.
        adapter: applied if given.
        max_new_tokens: most tokens of one answer.
        temperature: 0 is greedy; see `sampling.Sampling` for the filters.
        seed: prompt i of the list draws from (seed, i), whatever shares its batch.
        stop: the text ends before the first of these strings.
        batch_size: prompts on the devices at a time.
        reporter: told of finished prompts.

    Raises:
        InputError: an option out of range, an empty prompt, or more positions than the model has.
    """
    template = Template(model.tokenizer)
    single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Mapping))
    several: Sequence[Any] = [prompts] if single else prompts
    texts = answer_texts(
        model,
        [prompt_ids(prompt, template, f"prompt {i}") for i, prompt in enumerate(several)],
        adapter,
        template=template,
        stop=(stop,) if isinstance(stop, str) else tuple(stop or ()),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        batch_size=batch_size,
        reporter=reporter,
    )
    return texts[0] if single else texts


def answer_texts(
    model: Model,
    prompts: Sequence[Sequence[int]],
    adapter: Adapter | None,
    *,
    template: Template,
    stop: tuple[str, ...] = (),
    **options: Any,
) -> list[str]:
    """The new text of each prompt of tokens. `options`: those of `generate_tokens`."""
    tokenizer = template.tokenizer

    def text_of(ids: Sequence[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    def stopped(ids: Sequence[int]) -> bool:
        return any(s in text_of(ids) for s in stop)

    ends = end_tokens(model, template)
    found = generate_tokens(model, prompts, adapter, ends=ends, stopped=stopped if stop else None, **options)
    return [_cut(text_of(ids), stop) for ids in found]


def _cut(text: str, stop: tuple[str, ...]) -> str:
    places = [at for at in (text.find(s) for s in stop) if at >= 0]
    return text[: min(places)] if places else text


def prompt_ids(prompt: str | Chat, template: Template, where: str) -> list[int]:
    """A prompt as tokens: a conversation through the chat template, a string with BOS where that is added."""
    if isinstance(prompt, str):
        return template.with_bos(template.encode(prompt)[0])
    example = fill_documents(parse_example({"messages": list(prompt)}, where))
    if example.messages[-1]["role"] == "assistant":
        raise InputError(f"{where}: the conversation ends with the assistant; end it with what it should answer")
    return template.encode(template.render(example.messages, where, generate=True))[0]
