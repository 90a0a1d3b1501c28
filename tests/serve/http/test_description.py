"""The OpenAPI description is true: schemathesis calls every operation with what it allows and what it does not."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode, checks
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


OPERATIONS = [found.ok() for found in schema.get_all_operations()]
# What has no body takes every request.
CASES = [(each, mode) for each in OPERATIONS for mode in GenerationMode if each.body or mode == GenerationMode.POSITIVE]
# With names of their own, which schemathesis' own parametrisation does not give: xdist drops tests of equal names.
each_case = pytest.mark.parametrize(
    ("operation", "mode"), CASES, ids=[f"{mode.value} {each.label}" for each, mode in CASES]
)


@each_case
@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given(data=st.data())
def test_every_operation(operation: Any, mode: GenerationMode, data: st.DataObject) -> None:
    check(data.draw(operation.as_strategy(generation_mode=mode)))


@pytest.mark.slow
@each_case
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_operation_at_length(operation: Any, mode: GenerationMode, data: st.DataObject) -> None:
    check(data.draw(operation.as_strategy(generation_mode=mode)))
