"""Models: what is served, and adapters that come and go while it runs (vLLM's two endpoints)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest

from jora.errors import InputError
from jora.serve.adapters.validation import name_within
from jora.serve.http.auth import Client
from jora.serve.http.backend import AdapterInfo
from jora.serve.http.errors import ApiError, invalid, unknown_model
from jora.serve.http.responses import ModelCard, ModelList, Status
from jora.serve.http.schemas import LoadAdapter, UnloadAdapter
from jora.serve.http.server import Server
from jora.serve.http.streaming import json_response
from jora.serve.requests import UnknownAdapter


def router(server: Server) -> APIRouter:
    routes = APIRouter()

    def base() -> ModelCard:
        return ModelCard(**_card(server, server.model), root=server.model, parent=None)

    def card(info: AdapterInfo) -> ModelCard:
        found = ModelCard(
            **_card(server, info.name), root=PurePath(info.path).name, parent=server.model, method=info.method
        )
        found.rank = info.rank
        return found

    @routes.get("/v1/models", response_model=ModelList)
    async def list_models(http: HttpRequest) -> Response:
        client = server.client(http)
        served = [card(info) for info in await server.backend.adapters() if client.may_use(info.name)]
        return json_response(ModelList(object="list", data=[base(), *served]))

    @routes.get("/v1/models/{model_id:path}", response_model=ModelCard)
    async def get_model(model_id: str, http: HttpRequest) -> Response:
        client = server.client(http)
        if model_id == server.model:
            return json_response(base())
        return json_response(card(await server.adapter(model_id, client)))

    @routes.post("/v1/load_lora_adapter", response_model=Status)
    async def load_lora_adapter(body: LoadAdapter, http: HttpRequest) -> Response:
        name = body.lora_name
        with _managed(server, http, name) as client:
            _check_path(server, client, body.lora_path)
            if name == server.model:
                raise invalid(f"{name!r} is the base's name: choose another for the adapter", "lora_name")
            if not body.load_inplace and any(info.name == name for info in await server.backend.adapters()):
                raise invalid(f"adapter {name!r} is there already: unload it, or give load_inplace = true", "lora_name")
            try:
                await server.backend.load_adapter(name, body.lora_path)
            except InputError as error:
                raise invalid(str(error), "lora_path") from None
        return json_response(Status(status=f"Success: LoRA adapter {name!r} added."))

    @routes.post("/v1/unload_lora_adapter", response_model=Status)
    async def unload_lora_adapter(body: UnloadAdapter, http: HttpRequest) -> Response:
        with _managed(server, http, body.lora_name):
            try:
                await server.backend.unload_adapter(body.lora_name)
            except UnknownAdapter:
                raise unknown_model(body.lora_name) from None
        return json_response(Status(status=f"Success: LoRA adapter {body.lora_name!r} removed."))

    return routes


@contextmanager
def _managed(server: Server, http: HttpRequest, name: str) -> Iterator[Client]:
    """Refuse who may not manage this adapter, and changes to a server that is going away."""
    client = server.client(http)
    client.check_adapter(name)
    server.rates.admit(client)
    if not server.allow_adapter_loading:
        raise ApiError(403, "this server was started without --allow-adapter-loading", code="not_allowed")
    if server.draining:
        raise ApiError(503, "the server is shutting down", code="unavailable", headers={"Retry-After": "5"})
    with server.held_open():
        yield client


def _check_path(server: Server, client: Client, path: str) -> None:
    """Under a name of its own, a client that is limited to some adapters may load files of those alone."""
    if client.allowed is None:
        return
    name = None if server.adapters is None else name_within(server.adapters, path)
    if name is None or not client.may_use(name):
        message = f"this API key may not use the adapter at {path!r}"  # not where a link of it leads
        raise ApiError(403, message, param="lora_path", code="not_allowed")


def _card(server: Server, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": server.created,
        "owned_by": "jora",
        "max_model_len": server.text.max_length,
    }
