"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from jora.errors import InputError
from jora.serve.requests import Rejected, UnknownAdapter

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_LIMIT = 2000  # characters of a message: a validation error may quote what was sent


class ApiError(Exception):
    """An answer other than success. `param`: the field at fault; `code`: what programs compare."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})


class ClientGone(Exception):
    """The client closed the connection: nobody reads an answer any more."""


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def unknown_model(name: str) -> ApiError:
    return ApiError(404, f"The model {name!r} is not served here", param="model", code="model_not_found")


def error_body(error: ApiError) -> dict[str, Any]:
    kind = _TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    return {"error": {"message": error.message[:_LIMIT], "type": kind, "param": error.param, "code": error.code}}


def error_response(error: ApiError) -> Response:
    # ASCII escapes: a message may quote a lone surrogate, which UTF-8 cannot write.
    return Response(json.dumps(error_body(error)), error.status, error.headers, "application/json")


def as_api_error(error: Exception) -> ApiError | None:
    """What the engine raised, as an answer; None for what is not the client's or the load's doing."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Rejected):
        seconds = str(max(1, math.ceil(error.retry_after)))
        return ApiError(429, str(error), code="rate_limit_exceeded", headers={"Retry-After": seconds})
    if isinstance(error, UnknownAdapter):
        return ApiError(404, str(error), param="model", code="model_not_found")
    if isinstance(error, InputError):
        return invalid(str(error))
    return None


def _validation(error: RequestValidationError) -> ApiError:
    """The first of pydantic's errors, in the words of OpenAI's API."""
    errors = error.errors()
    first = errors[0]
    if first["type"] == "json_invalid":
        return invalid(f"the body is not valid JSON: {first.get('ctx', {}).get('error', 'cannot be read')}")
    # Where a field has several types there is an error of each; what came furthest is what was meant.
    alike = [e for e in errors if e["loc"][:2] == first["loc"][:2]]
    depth = {id(e): (_field(e["loc"][1:], error.body) or "").count(".") for e in alike}
    first = max(alike, key=lambda e: depth[id(e)])
    name = _field(first["loc"][1:], error.body)
    if first["type"] == "extra_forbidden":
        return invalid(f"Unrecognized request argument supplied: {name}", name, "unknown_parameter")
    if first["type"] == "none_required":
        return invalid(f"{name} is not supported by this server", name, "unsupported_parameter")
    texts = [e["msg"].removeprefix("Value error, ") for e in errors if _field(e["loc"][1:], error.body) == name]
    message = "; or ".join(dict.fromkeys(texts))
    return invalid(f"{name}: {message}" if name else message, name)


def _field(place: Sequence[int | str], body: Any) -> str | None:
    """The path of a value in the body: pydantic's without its names for the types that it tried."""
    found: list[str] = []
    for at, part in enumerate(place):
        if (isinstance(body, dict) and part in body) or (isinstance(body, list) and isinstance(part, int)):
            body = body[part]  # type: ignore[index]
            found.append(str(part))
        elif at == len(place) - 1 and isinstance(body, dict) and isinstance(part, str):
            found.append(part)  # a field that is missing
    return ".".join(found) or None


def install(app: FastAPI) -> None:
    """Give every error of the app OpenAI's shape."""

    async def known(_: Request, error: Exception) -> Response:
        found = as_api_error(error)
        assert found is not None
        return error_response(found)

    async def validation(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_response(_validation(error))

    async def http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = str(error.detail or HTTPStatus(error.status_code).phrase)
        return error_response(ApiError(error.status_code, message, headers=error.headers))

    async def gone(_: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nginx's number; it is seen by logs and metrics only

    async def unexpected(_: Request, error: Exception) -> Response:
        # The traceback goes to the log, not to the client. uvicorn closes the connection behind this: say so.
        return error_response(ApiError(500, "internal error", code="internal_error", headers={"Connection": "close"}))

    app.add_exception_handler(ApiError, known)
    app.add_exception_handler(InputError, known)
    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(ClientGone, gone)
    app.add_exception_handler(Exception, unexpected)
