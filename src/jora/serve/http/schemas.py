"""The bodies of requests: OpenAI's fields, and vLLM's where OpenAI has none.

A field that is not known is refused by name: a misspelt one would otherwise change nothing, silently. `None` as a type
marks a field that is known and not supported, because it would change the answer.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, field_validator

Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Probability = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Alternatives = Annotated[int, Field(ge=0, le=20)]
Stop = Annotated[str, Field(min_length=1, max_length=4096)]
Unsupported: TypeAlias = None
MAX_PROMPTS = 1024


class Body(BaseModel):
    # Strict: "5" is not 5. Everything comes from JSON, which has types of its own.
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool | None = Field(None, description="Ignored: chunks are never padded.")


class StructuredOutputs(Body):
    """One of these; vLLM's field."""

    json_: dict[str, Any] | str | None = Field(None, alias="json", description="JSON schema")
    regex: str | None = None
    choice: list[str] | None = Field(None, min_length=1)
    grammar: str | None = Field(None, description="Lark grammar")
    json_object: bool | None = None


class Generation(Body):
    """What completions and chat completions have in common."""

    model: str = Field(description="The base's name or an adapter's.", min_length=1)
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] = 0
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = Field(None, description="0 and -1 keep all tokens.")
    min_p: Probability | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    seed: Int64 | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=64)] | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=1024)] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, description="Token ids to what is added to their logits.", max_length=4096
    )
    prompt_logprobs: Alternatives | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    timeout: Annotated[float, Field(gt=0, le=86400)] | None = Field(
        None, description="Seconds after which the request is ended with an error."
    )
    guided_json: dict[str, Any] | str | None = Field(None, description="JSON schema")
    guided_regex: str | None = None
    guided_choice: list[str] | None = Field(None, min_length=1)
    guided_grammar: str | None = Field(None, description="Lark grammar")
    structured_outputs: StructuredOutputs | None = None
    skip_special_tokens: Literal[True] = True

    user: str | None = Field(None, description="Ignored.")
    metadata: dict[str, Any] | None = Field(None, description="Ignored.")
    store: bool | None = Field(None, description="Ignored: nothing is stored.")
    service_tier: str | None = Field(None, description="Ignored.")
    safety_identifier: str | None = Field(None, description="Ignored.")
    prompt_cache_key: str | None = Field(None, description="Ignored: prompts that begin alike share what they can.")
    prompt_cache_retention: str | None = Field(None, description="Ignored.")
    prompt_cache_options: dict[str, Any] | None = Field(None, description="Ignored.")


class CompletionRequest(Generation):
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    echo: bool | None = None
    logprobs: Alternatives | None = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = Field(None, description="Must equal n.")
    suffix: Unsupported = None
    add_special_tokens: bool = True
    response_format: ResponseFormat | None = None


class JsonSchema(Body):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(None, description="Ignored: the schema is always kept.")


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class TextPart(Body):
    type: Literal["text"]
    text: str


class CalledFunction(Body):
    name: str
    arguments: str = Field(description="JSON")


class CalledTool(Body):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[CalledTool] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = Field(None, description="Ignored.")
    citations: list[Any] | None = Field(None, description="Ignored: of an answer of this server that is sent back.")
    audio: Unsupported = None
    function_call: Unsupported = None

    @field_validator("content", mode="before")
    @classmethod
    def _text_only(cls, content: Any) -> Any:
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind != "text":
                raise ValueError(f"this server reads text only; parts of type {kind[:40]!r} are not supported")
        return content


class Function(Body):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON schema")
    strict: bool | None = Field(None, description="Ignored: forced calls always keep the schema, others need not.")


class Tool(Body):
    type: Literal["function"]
    function: Function


class FunctionName(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: FunctionName


class Conversation(Body):
    """What is rendered into the prompt."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=4096)
    tools: list[Tool] | None = Field(None, max_length=512)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Further variables of the chat template.")


class ChatRequest(Generation, Conversation):
    max_completion_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    add_special_tokens: Literal[False] = False
    modalities: list[Literal["text"]] | None = None
    audio: Unsupported = None
    prediction: Unsupported = None
    web_search_options: Unsupported = None
    functions: Unsupported = Field(None, description="Use tools.")
    function_call: Unsupported = Field(None, description="Use tool_choice.")
    reasoning_effort: Unsupported = Field(None, description="Use chat_template_kwargs where the template has it.")
    verbosity: Unsupported = None
    moderation: Unsupported = None


class TokenizeText(Body):
    prompt: str
    model: str | None = None
    add_special_tokens: bool = True
    return_token_strs: bool | None = None


class TokenizeChat(Conversation):
    model: str | None = None
    add_special_tokens: bool = False
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    tokens: list[Token]
    model: str | None = None


class LoadAdapter(Body):
    lora_name: str = Field(min_length=1, max_length=256)
    lora_path: str = Field(min_length=1, max_length=4096)
    load_inplace: bool = Field(False, description="Replace the adapter that has this name.")


class UnloadAdapter(Body):
    lora_name: str = Field(min_length=1, max_length=256)
    lora_int_id: int | None = Field(None, description="Ignored.")


class EmbeddingRequest(BaseModel):
    """Anything: there are no embeddings."""

    model_config = ConfigDict(extra="allow")


CompletionRequest.model_rebuild()
