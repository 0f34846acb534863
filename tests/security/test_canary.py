"""No content in logs, exceptions, representations, reports, traces or files: a canary is searched for."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from safeguard import CheckTimeout, Guard, Policy, RefineRequest, SafeguardError, capture
from safeguard.checks.blocklist import Blocklist
from safeguard.testing import FailingCheck, HangingCheck, ScoreCheck, SwapRefiner, WordCheck
from tests.security.canary import CANARY, everything_said, logged

PROMPT = f"{CANARY} and a knife"
LEAKY = ValueError(f"cannot handle {CANARY}")


class Leaky:
    """Refines by raising, with the prompt in the error, as an untidy model may."""

    name = "leaky"

    def __call__(self, requests: Sequence[RefineRequest], /) -> list[str]:
        raise RuntimeError(f"no idea what to make of {requests[0].prompt}") from LEAKY


class Odd:
    """Gives results that are nothing a check may give."""

    name = "odd"
    modality = "text"

    def __init__(self, result: Any) -> None:
        self._result = result

    def __call__(self, batch: Sequence[str], /) -> Any:
        return [self._result] * len(batch)


def echo(prompt: str) -> str:
    return prompt


async def aecho(prompt: str) -> str:
    return prompt


def stream(prompt: str) -> Iterator[str]:
    yield from (prompt[i : i + 5] for i in range(0, len(prompt), 5))


async def astream(prompt: str) -> AsyncIterator[str]:
    for part in stream(prompt):
        yield part


async def _gathered(parts: AsyncIterator[str]) -> str:
    return "".join([part async for part in parts])


CALLS: dict[str, Callable[[Guard], Any]] = {
    "function": lambda guard: guard(echo)(PROMPT),
    "batch": lambda guard: guard(echo)(["a day out", PROMPT]),  # type: ignore[arg-type]
    "coroutine": lambda guard: asyncio.run(guard(aecho)(PROMPT)),
    "generator": lambda guard: "".join(guard(stream)(PROMPT)),
    "async generator": lambda guard: asyncio.run(_gathered(guard(astream)(PROMPT))),
    "stream": lambda guard: "".join(guard.stream(iter([PROMPT]))),
    "check_input": lambda guard: guard.check_input(PROMPT),
    "check_output": lambda guard: guard.check_output([PROMPT]),
}
REFINE = {"input": {"llm": {"action": "refine"}}}
GUARDS: dict[str, Callable[[], Guard]] = {
    "blocks prompts": lambda: Guard([WordCheck("knife")]),
    "blocks results": lambda: Guard(outputs=[WordCheck("knife")]),
    "raises on prompts": lambda: Guard([FailingCheck(LEAKY)]),
    "raises on results": lambda: Guard(outputs=[FailingCheck(LEAKY)]),
    "lets failures pass": lambda: Guard(
        [FailingCheck(LEAKY)], [FailingCheck(LEAKY)], policy=Policy(on_error="allow")
    ),
    "gives NaN": lambda: Guard([ScoreCheck({}, {"bad": float("nan")})], [Odd({"bad": float("inf")})]),
    "gives no scores": lambda: Guard([Odd({})], [Odd(None)]),
    "gives text for scores": lambda: Guard([Odd({"bad": PROMPT})], [Odd(PROMPT)]),
    "is too short": lambda: Guard([WordCheck("x")], [WordCheck("x")], policy=Policy(max_chars=5)),
    "refines by raising": lambda: Guard(
        [WordCheck("knife")], refiner=Leaky(), policy=Policy.from_data(REFINE)
    ),
    "refines in vain": lambda: Guard(
        [WordCheck("knife")], refiner=SwapRefiner({"and": "or"}), policy=Policy.from_data(REFINE)
    ),
    "cuts words out": lambda: Guard(
        [Blocklist(["knife"])],
        [Blocklist(["and"])],
        policy=Policy.from_data(
            {"input": {"llm": {"action": "redact"}}, "output": {"text": {"action": "redact"}}}
        ),
    ),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("guard", GUARDS)
def test_nothing_of_the_content_is_told(
    guard: str, call: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    made = GUARDS[guard]()
    said = []
    with caplog.at_level(0), capture() as reports:
        try:
            CALLS[call](made)
        except SafeguardError as error:
            said.append(everything_said(error))
            said.append(repr(getattr(error, "reports", "")))
    for report in reports:
        told = report.to_dict()
        told.pop("revised_prompt")  # the one field that is content, and says so
        said += [repr(report), report.summary(), json.dumps(told)]
    out, err = capfd.readouterr()
    said += [logged(caplog.records), repr(made), out, err]
    assert CANARY not in "\n".join(said)


def test_time_out_does_not_tell_and_neither_does_what_comes_after_it(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    class Late(HangingCheck):
        def __call__(self, batch: Sequence[str], /) -> Any:
            super().__call__(batch)
            raise LEAKY

    check = Late()
    made = Guard([check], policy=Policy(check_timeout_s=0.05))
    with caplog.at_level(0), pytest.raises(CheckTimeout) as caught:
        asyncio.run(made(aecho)(PROMPT))
    check.release()
    said = everything_said(caught.value) + logged(caplog.records) + "".join(capfd.readouterr())
    assert CANARY not in said


def test_error_of_the_application_itself_passes_through_and_is_not_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(prompt: str) -> str:
        raise LEAKY

    with caplog.at_level(0), pytest.raises(ValueError, match=CANARY) as caught:
        Guard([WordCheck("x")], [WordCheck("x")])(broken)(PROMPT)
    assert caught.value is LEAKY
    assert CANARY not in logged(caplog.records)


def test_canary_is_found_where_something_leaks(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RuntimeError) as caught:
        Leaky()([RefineRequest("harmless")])
    assert CANARY in everything_said(caught.value)  # by its cause
    with caplog.at_level(0):
        logging.getLogger("x").debug("a %s", PROMPT)
    assert CANARY in logged(caplog.records)


# --- the command line, and files ----------------------------------------------------------------


def run(folder: Path, *arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
    """`safeguard check` in a folder of its own, with a word list as its only check."""
    (folder / "words.txt").write_text("knife\n", encoding="utf-8")
    (folder / "policy.yaml").write_text(
        "input: {llm: {checks: ['blocklist:words.txt']}}\noutput: {text: {checks: ['blocklist:words.txt']}}\n"
    )
    command = [sys.executable, "-m", "safeguard.cli", "check", "--policy", "policy.yaml", *arguments]
    return subprocess.run(command, cwd=folder, input=given, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ((PROMPT,), ""),
        (("--json", PROMPT), ""),
        (("-",), f"{PROMPT}\nfine\n"),
        (("--json", "--input", "rows.jsonl", "--skip-bad"), ""),
        (("--input", "rows.jsonl"), ""),
        (("--input", "rows.jsonl", "--field", "none"), ""),
    ],
)
def test_command_line_says_nothing_of_the_content(
    tmp_path: Path, arguments: tuple[str, ...], given: str
) -> None:
    rows = [json.dumps({"text": PROMPT}), f"{{{CANARY}", json.dumps([CANARY]), json.dumps({"text": [CANARY]})]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    done = run(tmp_path, *arguments, given=given)
    assert done.returncode in (1, 2), done.stderr
    assert CANARY not in done.stdout + done.stderr


LEFT_BEHIND = """
import sys, tempfile
from safeguard import Guard, Policy, Blocked
from safeguard.testing import WordCheck, SwapRefiner
prompt = sys.argv[1]
refine = Policy.from_data({"input": {"llm": {"action": "refine"}}})
Guard([WordCheck("knife")], refiner=SwapRefiner({"knife": "spoon"}), policy=refine).check_input(prompt)
try:
    "".join(Guard(outputs=[WordCheck("knife")]).stream([prompt]))
except Blocked:
    pass
"""


def test_nothing_is_left_in_files(tmp_path: Path) -> None:
    places = {"TMPDIR": "tmp", "HOME": "home", "XDG_CACHE_HOME": "cache", "PYTHONDONTWRITEBYTECODE": "1"}
    env = {key: str(tmp_path / name) for key, name in places.items()}
    for name in ("tmp", "home", "cache", "work"):
        (tmp_path / name).mkdir()
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", LEFT_BEHIND, PROMPT]
    subprocess.run(command, cwd=tmp_path / "work", env=env | {"PYTHONPATH": root}, check=True)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
