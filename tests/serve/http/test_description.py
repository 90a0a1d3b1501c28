"""The OpenAPI description is true: schemathesis calls every operation with what it allows and what it does not."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis import checks
from schemathesis.specs.openapi import checks as openapi_checks
from tests.serve.http.fakes import FakeEngine, make_server

from jora.serve.http.app import create_app

SERVER = make_server()
schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(SERVER))
CHECKS = (
    checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
    openapi_checks.negative_data_rejection,
)


def check(case: Any) -> None:
    assert isinstance(SERVER.backend, FakeEngine)
    SERVER.backend.known = {name: info for name, info in SERVER.backend.known.items() if name in ("alpha", "beta")}
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str) and case.body["model"]:
        case.body["model"] = "tiny"  # any other is 404, which would hide the rest
    case.call_and_validate(checks=CHECKS)


@schema.parametrize()
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
def test_every_operation(case: Any) -> None:
    check(case)


@pytest.mark.slow
@schema.parametrize()
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_operation_at_length(case: Any) -> None:
    check(case)
