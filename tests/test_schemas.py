from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from safeguard.policy import Policy
from safeguard.schemas import ReportData, policy_schema, report_schema
from safeguard.types import Action, Coverage, Report, Span, Verdict


def full_report() -> Report:
    """A report in which no part is empty."""
    verdict = Verdict(
        "words",
        "input",
        Action.REFINE,
        {"toxic": 0.75},
        {"toxic": 0.5},
        ("toxic",),
        (Span(2, 6, "toxic", 0.75),),
        Coverage("tokens", 20, 20, 3),
        1.5,
        "ab" * 32,
        None,
        "prompt",
        0,
    )
    failed = Verdict("slow", "output", Action.BLOCK, {}, error="timed out", source="output", round=1)
    return Report(
        Action.BLOCK, (verdict, failed), "new", "softener", 1, 3.25, "standard", "cd" * 32, "0123456789ab"
    )


def accepts(schema: dict[str, Any], value: Any, definitions: dict[str, Any]) -> bool:
    """Whether a value meets the part of JSON Schema that ours use."""
    if "$ref" in schema:
        return accepts(definitions[schema["$ref"].rsplit("/", 1)[1]], value, definitions)
    if "anyOf" in schema:
        return any(accepts(part, value, definitions) for part in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    if "const" in schema:
        return bool(value == schema["const"])
    kinds: dict[str, Any] = {
        "object": dict,
        "array": list,
        "string": str,
        "boolean": bool,
        "number": (int, float),
        "integer": int,
        "null": type(None),
    }
    if not isinstance(value, kinds[schema["type"]]):
        return False
    if schema["type"] == "object":
        known = schema.get("properties", {})
        rest = schema.get("additionalProperties", True)
        return set(schema.get("required", ())) <= set(value) and all(
            accepts(known[key], part, definitions)
            if key in known
            else accepts(rest, part, definitions)
            if isinstance(rest, dict)
            else rest
            for key, part in value.items()
        )
    if schema["type"] == "array":
        return all(accepts(schema["items"], part, definitions) for part in value)
    if isinstance(value, int | float):
        return bool(schema.get("minimum", value) <= value <= schema.get("maximum", value))
    return True


def accepted(schema: dict[str, Any], value: Any) -> bool:
    return accepts(schema, value, schema["$defs"])


def test_a_full_report_meets_the_schema() -> None:
    assert accepted(report_schema(), json.loads(full_report().to_json()))


def test_a_bare_report_meets_the_schema() -> None:
    assert accepted(report_schema(), json.loads(Report(Action.ALLOW).to_json()))


@pytest.mark.parametrize(
    ("key", "value"), [("action", "pass"), ("risk", 1.5), ("latency_ms", -1), ("verdicts", {}), ("extra", 1)]
)
def test_what_a_report_never_says_does_not_meet_the_schema(key: str, value: Any) -> None:
    data = full_report().to_dict() | {key: value}

    assert not accepted(report_schema(), data)


def test_every_key_of_a_report_is_required() -> None:
    assert report_schema()["required"] == list(full_report().to_dict())


def test_every_key_of_a_verdict_is_required() -> None:
    verdict = full_report().to_dict()["verdicts"][0]

    assert report_schema()["$defs"]["VerdictData"]["required"] == list(verdict)


def test_every_action_is_in_the_schema() -> None:
    assert report_schema()["properties"]["action"]["enum"] == [action.value for action in Action]


def test_a_report_survives_the_way_through_the_model() -> None:
    data = full_report().to_dict()

    assert ReportData.model_validate(data).model_dump() == data


def test_a_number_that_is_none_is_refused() -> None:
    with pytest.raises(ValidationError, match="risk"):
        ReportData.model_validate(full_report().to_dict() | {"risk": float("nan")})


@pytest.mark.parametrize("name", ["monitor", "lenient", "standard", "strict"])
def test_the_presets_meet_the_schema_of_policies(name: str) -> None:
    data = json.loads(Policy.preset(name).to_text("json"))

    assert all(key in policy_schema()["properties"] for key in data)


def test_the_schema_of_policies_refuses_unknown_keys() -> None:
    assert policy_schema()["additionalProperties"] is False


def test_both_schemas_name_their_dialect() -> None:
    assert {policy_schema()["$schema"], report_schema()["$schema"]} == {
        "https://json-schema.org/draft/2020-12/schema"
    }
