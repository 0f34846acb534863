"""Guardrails for diffusers pipelines, causal language models and any generating function."""

from __future__ import annotations

from safeguard.errors import (
    BackendError,
    Blocked,
    CheckFailed,
    CheckTimeout,
    MissingExtra,
    PackError,
    PackNotFound,
    PolicyError,
    RefinerError,
    SafeguardError,
    UnknownName,
    UnseenInput,
)
from safeguard.guards import Guard, capture, guard
from safeguard.policy import Policy
from safeguard.stats import Stats
from safeguard.types import (
    Action,
    Check,
    Coverage,
    Finding,
    Refiner,
    RefineRequest,
    Report,
    Span,
    Verdict,
)

__version__ = "0.3.0"

__all__ = [
    "Action",
    "BackendError",
    "Blocked",
    "Check",
    "CheckFailed",
    "CheckTimeout",
    "Coverage",
    "Finding",
    "Guard",
    "MissingExtra",
    "PackError",
    "PackNotFound",
    "Policy",
    "PolicyError",
    "RefineRequest",
    "Refiner",
    "RefinerError",
    "Report",
    "SafeguardError",
    "Span",
    "Stats",
    "UnknownName",
    "UnseenInput",
    "Verdict",
    "capture",
    "guard",
]
