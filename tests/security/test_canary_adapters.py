"""The canary through every adapter: pipelines and models do not tell either."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("diffusers", reason="diffusers is not installed (extra diffusers)")

from safeguard import Guard, Policy, SafeguardError, capture
from safeguard.testing import BrightCheck, FailingCheck, WordCheck
from tests.adapters.test_every_adapter import CASES, Case
from tests.security.canary import CANARY, everything_said, logged

LEAKY = ValueError(f"cannot handle {CANARY}")
GUARDS: dict[str, dict[str, Any]] = {
    "blocks prompts": {"inputs": [WordCheck("knife")]},
    "blocks results": {"outputs": [WordCheck("blood"), BrightCheck()]},
    "raises": {"inputs": [FailingCheck(LEAKY)]},
    "raises on results": {"outputs": [FailingCheck(LEAKY), FailingCheck(LEAKY, modality="image")]},
    "is too short": {"inputs": [WordCheck("x")], "policy": Policy(max_chars=3)},
}


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_nothing_of_the_content_is_told(
    case: Case, guard: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    target, _ = case.make()
    guarded = Guard(**GUARDS[guard])(target, **case.how)
    said = [repr(guarded)]
    capfd.readouterr()
    with caplog.at_level(0, logger="safeguard"), capture() as reports:
        try:
            case.call(guarded, f"white blood, a knife, {CANARY}?")
        except SafeguardError as error:
            said.append(everything_said(error) + repr(getattr(error, "reports", "")))
    said += [repr(report) + report.to_json() for report in reports]
    said += [logged([r for r in caplog.records if r.name.startswith("safeguard")]), *capfd.readouterr()]
    assert CANARY not in "\n".join(said)
