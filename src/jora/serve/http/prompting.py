"""A conversation as the model's chat template writes it; of a model that has none, as training wrote it."""

from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING, Any

from jora.data.chat import PINNED, Template
from jora.serve.http.errors import invalid
from jora.serve.http.schemas import ChatMessage, Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Errors that templates make of conversations which they do not expect.
_TEMPLATE_ERRORS = (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError, RecursionError)


def plain_messages(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as templates take them: content a string, arguments of calls as objects, "developer" as "system"."""
    return [_plain(message, f"messages.{at}") for at, message in enumerate(messages)]


def _plain(message: ChatMessage, where: str) -> dict[str, Any]:
    content = message.content
    if isinstance(content, list):
        content = "\n".join(part.text for part in content)
    plain: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": content or "",
    }
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            plain[name] = value
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments, where)},
            }
            for call in message.tool_calls
        ]
    return plain


def _arguments(text: str, where: str) -> Any:
    try:
        return json.loads(text or "{}")
    except (ValueError, RecursionError):
        raise invalid(f"{where}.tool_calls: arguments are not JSON", f"{where}.tool_calls") from None


def plain_tools(body: Conversation) -> list[dict[str, Any]] | None:
    return [tool.model_dump(exclude_unset=True, exclude={"function": {"strict"}}) for tool in body.tools or ()] or None


class Renderer:
    """Renders conversations. Raises InputError for a tokenizer that `Template` refuses."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        template = Template(tokenizer)
        self.is_mistral = "[TOOL_CALLS]" in template.text
        self._fixed: dict[str, Any] = {}
        if template.is_default:
            self._fixed = {"chat_template": template.text, "start": tokenizer.bos_token if template.adds_bos else ""}
        # What a request may not set: it would change how a template is applied, not what it is told.
        parameters = inspect.signature(tokenizer.apply_chat_template).parameters
        self._reserved = {*parameters, *self._fixed, "messages", "tools"}

    def takes_tools(self) -> bool:
        return not self._fixed and "tools" in self.tokenizer.get_chat_template(tools=[{}])

    def render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, body: Conversation) -> str:
        """The prompt's text. Raises `ApiError` 400 for what the template refuses."""
        import jinja2

        self._check(tools, body)
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                tokenize=False,
                add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
                continue_final_message=body.continue_final_message,
                **{**PINNED, **(body.chat_template_kwargs or {}), **self._fixed},
            )
        except (jinja2.TemplateError, *_TEMPLATE_ERRORS) as error:
            text = " ".join(str(error).split())
            raise invalid(f"the model's chat template refuses this conversation: {text}", "messages") from None

    def _check(self, tools: list[dict[str, Any]] | None, body: Conversation) -> None:
        if tools and not self.takes_tools():
            raise invalid("the model's chat template has no place for tools", "tools", "unsupported_parameter")
        for name in body.chat_template_kwargs or ():
            if name in self._reserved:
                raise invalid(f"chat_template_kwargs: {name!r} cannot be set", "chat_template_kwargs")
