"""POST /tokenize and /detokenize, with vLLM's bodies."""

from __future__ import annotations

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest

from jora.serve.http.errors import invalid
from jora.serve.http.prompting import plain_messages, plain_tools
from jora.serve.http.responses import Detokenized, Tokens
from jora.serve.http.schemas import DetokenizeRequest, TokenizeChat, TokenizeText
from jora.serve.http.server import Server
from jora.serve.http.streaming import json_response


def router(server: Server) -> APIRouter:
    routes = APIRouter()

    async def check(http: HttpRequest, model: str | None) -> None:
        client = server.client(http)
        server.rates.admit(client)
        if model is not None and model != server.model:
            await server.adapter(model, client)

    @routes.post("/tokenize", response_model=Tokens)
    async def tokenize(body: TokenizeText | TokenizeChat, http: HttpRequest) -> Response:
        await check(http, body.model)
        if isinstance(body, TokenizeChat):
            messages, tools = plain_messages(body.messages), plain_tools(body)
            text = await server.text.beside(lambda: server.renderer.render(messages, tools, body))
        else:
            text = body.prompt
        [tokens] = await server.text.encode([text], body.add_special_tokens)
        found = Tokens(count=len(tokens), max_model_len=server.text.max_length, tokens=tokens)
        if body.return_token_strs:
            found.token_strs = [server.text.token_text(token) for token in tokens]
        return json_response(found)

    @routes.post("/detokenize", response_model=Detokenized)
    async def detokenize(body: DetokenizeRequest, http: HttpRequest) -> Response:
        await check(http, body.model)
        if body.tokens and max(body.tokens) >= server.text.vocab_size:
            raise invalid(f"tokens: {max(body.tokens)} is not in the vocabulary", "tokens")
        return json_response(Detokenized(prompt=await server.text.beside(lambda: server.text.decode(body.tokens))))

    return routes
