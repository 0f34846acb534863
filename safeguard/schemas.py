"""JSON Schemas of what goes in and comes out as data: policies and reports."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from safeguard.policy import Policy

DIALECT = "https://json-schema.org/draft/2020-12/schema"

Probability = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Milliseconds = Annotated[float, Field(ge=0)]
ActionName = Literal["allow", "monitor", "redact", "replace", "regenerate", "refine", "block"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True, frozen=True)


class SpanData(_Part):
    """Characters start to end (exclusive) of the text that was judged, and why they count."""

    start: Count
    end: Count
    category: str
    score: Probability


class CoverageData(_Part):
    """How much of an item was looked at: `checked` of `total` units, in `windows` pieces."""

    unit: str
    total: Count
    checked: Count
    windows: Count


class VerdictData(_Part):
    """What one check said of one piece of content, and what the policy made of it."""

    check: str
    stage: Literal["input", "output"]
    source: str = Field(description="the piece: prompt, negative_prompt, output, ...")
    round: Count
    action: ActionName
    scores: dict[str, Probability]
    thresholds: dict[str, Probability] = Field(description="of the judged categories only")
    margins: dict[str, float] = Field(description="score minus threshold; zero or more means flagged")
    flagged: list[str]
    spans: list[SpanData]
    coverage: CoverageData | None
    latency_ms: Milliseconds
    model: str | None = Field(description="digest of the model")
    error: str | None = Field(description="why the piece could not be judged")


class PolicyRef(_Part):
    """Which policy judged."""

    name: str
    digest: str = Field(description="SHA-256 of the policy in canonical JSON")


class ReportData(_Part):
    """Everything said of one item, over all rounds: the form of `Report.to_dict()`."""

    action: ActionName = Field(description="what finally happened to the item")
    risk: Probability = Field(description="largest probability among the judged categories")
    flagged: list[str] = Field(description="categories over their thresholds in the final verdicts")
    blocked: bool
    failed: bool = Field(description="withheld because it could not be judged")
    revised_prompt: str | None
    refiner: str | None
    rounds: Count = Field(description="generations beyond the first")
    latency_ms: Milliseconds = Field(description="the guard's own time")
    policy: PolicyRef
    content: str | None = Field(description="salted hash of the original text")
    decoding: str | None = Field(description="the guard inside the decoding that the call went through")
    verdicts: list[VerdictData]


def policy_schema() -> dict[str, Any]:
    """JSON Schema of a policy file."""
    return {"$schema": DIALECT, **Policy.model_json_schema()}


def report_schema() -> dict[str, Any]:
    """JSON Schema of a report as `Report.to_dict()` gives it and `safeguard check --json` prints it."""
    return {"$schema": DIALECT, **ReportData.model_json_schema(mode="serialization"), "title": "Report"}
