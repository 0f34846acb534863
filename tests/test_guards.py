"""What a guarded call tells, and that calls beside each other do not disturb each other."""

from __future__ import annotations

import asyncio
import pickle
import threading
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import safeguard
from safeguard import (
    Action,
    Blocked,
    CheckFailed,
    Finding,
    Guard,
    MissingExtra,
    PackNotFound,
    Policy,
    Span,
    UnknownName,
    capture,
)
from safeguard.calls import Ask, Item, Outcome
from safeguard.judging import text_piece
from safeguard.testing import BrightCheck, FailingCheck, HangingCheck, ScoreCheck, SwapRefiner, WordCheck
from tests.policies import echo, llm, policy


def shout(prompts: list[str]) -> list[str]:
    return [p.upper() for p in prompts]


# --- reports ----------------------------------------------------------------------------------


def test_risk_is_the_largest_judged_score_also_where_nothing_is_flagged() -> None:
    check = ScoreCheck({"x": {"bad": 0.3, "worse": 0.4, "other": 0.9}})
    guard = Guard(inputs=[check], policy=policy(input={"llm": {"ignore": ["other"]}}))
    (report,) = guard.check_input("x")
    assert (report.risk, report.action) == (0.4, Action.ALLOW)


def test_margin_is_score_minus_threshold() -> None:
    check = ScoreCheck({"x": {"bad": 0.75}})
    (report,) = Guard(inputs=[check]).check_input("x")
    assert report.verdicts[0].margins == {"bad": 0.25}


def test_report_tells_policy_round_and_revised_prompt() -> None:
    guard = Guard(inputs=[WordCheck("knife")], refiner=SwapRefiner({"knife": "spoon"}), policy=llm("refine"))
    (report,) = guard.check_input("a knife")
    assert (report.action, report.revised_prompt, report.refiner) == (Action.REFINE, "a spoon", "swap")
    assert [(v.round, v.flagged) for v in report.verdicts] == [(0, ("bad",)), (1, ())]
    assert report.policy_digest == guard.policy.digest


def test_refined_prompt_keeps_the_risk_of_what_was_asked() -> None:
    guard = Guard(inputs=[WordCheck("knife")], refiner=SwapRefiner({"knife": "spoon"}), policy=llm("refine"))
    assert guard.check_input("a knife")[0].risk == 1.0


def test_calibrated_thresholds_of_a_check_hold_at_the_operating_point_of_the_policy() -> None:
    check = ScoreCheck({"x": {"bad": 0.4}})
    check.operating_points = {"strict": {"bad": 0.3}, "lenient": {"bad": 0.6}}  # type: ignore[attr-defined]
    strict = Guard(inputs=[check], policy=policy(operating_point="strict"))
    lenient = Guard(inputs=[check], policy=policy(operating_point="lenient"))
    assert strict.check_input("x")[0].flagged == ("bad",)
    assert lenient.check_input("x")[0].flagged == ()


def test_content_hash_is_the_same_for_the_same_salt_and_text() -> None:
    one, two = (
        Guard(inputs=[WordCheck("k")], salt=b"salt").check_input("hello")[0].content for _ in range(2)
    )
    other = Guard(inputs=[WordCheck("k")], salt=b"pepper").check_input("hello")[0].content
    assert one == two != other


def test_on_report_gets_every_report() -> None:
    seen: list[Any] = []
    Guard(inputs=[WordCheck("knife")], on_report=seen.append)(shout)(["a", "b"])
    assert [r.action for r in seen] == [Action.ALLOW, Action.ALLOW]


def test_nothing_of_the_content_is_in_errors_logs_or_reprs(caplog: pytest.LogCaptureFixture) -> None:
    canary = "xylophone-4711 knife"
    guard = Guard(
        inputs=[FailingCheck(ValueError(canary), when=lambda i: "odd" in i), WordCheck("knife")],
        refiner=SwapRefiner({"nothing": ""}),
        policy=llm("refine"),
    )
    with caplog.at_level("DEBUG"), pytest.raises(Blocked) as info:
        guard(shout)([canary, canary + " odd"])
    said = caplog.text + str(info.value) + repr(info.value.reports) + info.value.report.to_json()
    assert "xylophone" not in said


# --- concurrency ------------------------------------------------------------------------------


def test_async_runs_checks_off_the_event_loop() -> None:
    threads: list[int] = []

    class Spy(WordCheck):
        def __call__(self, batch: Sequence[str], /) -> Any:
            threads.append(threading.get_ident())
            return super().__call__(batch)

    async def reply(prompt: str) -> str:
        return prompt

    assert asyncio.run(Guard(inputs=[Spy("knife")])(reply)("hi")) == "hi"
    assert threads
    assert threading.get_ident() not in threads


def test_reports_of_two_tasks_are_kept_apart() -> None:
    async def reply(prompt: str) -> str:
        await asyncio.sleep(0.01)
        return prompt

    guarded = Guard(inputs=[WordCheck("knife")], policy=policy(on_block="replace"))(reply)

    async def one(prompt: str) -> bool:
        with capture() as reports:
            await guarded(prompt)
        return [r.blocked for r in reports] == ["knife" in prompt]

    async def many() -> list[bool]:
        return await asyncio.gather(*(one("knife" if i % 2 else "loaf") for i in range(20)))

    assert all(asyncio.run(many()))


def test_cancelled_task_leaves_the_guard_usable() -> None:
    check = HangingCheck()
    guarded = Guard(inputs=[check], policy=policy(check_timeout_s=20))(echo_async)

    async def cancel() -> str:
        task = asyncio.create_task(guarded("first"))
        while not check.entered.is_set():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        check.release()
        return await guarded("second")

    assert asyncio.run(cancel()) == "second"


async def echo_async(prompt: str) -> str:
    return prompt


def test_results_can_be_judged_where_no_input_check_is_installed() -> None:
    rules = {"input": {"llm": {"checks": ["not-installed"]}}}
    (report,) = Guard(outputs=[WordCheck("knife")], policy=policy(**rules)).check_output("a knife")
    assert report.action is Action.BLOCK


def test_check_of_a_modality_that_is_never_asked_is_refused() -> None:
    with pytest.raises(
        ValueError, match="inputs take checks of modality text, got 'bright' of modality 'image'"
    ):
        Guard(inputs=[BrightCheck()])


def test_flagged_content_is_blocked_not_failed_where_another_failure_was_let_through() -> None:
    guard = Guard(inputs=[WordCheck("knife"), FailingCheck()], policy=policy(on_error="allow"))
    with pytest.raises(Blocked) as caught:
        guard(echo)("a knife")
    assert not caught.value.report.failed


def test_failure_of_the_check_of_a_refined_prompt_is_a_failure() -> None:
    class Moody(WordCheck):
        """Cannot judge what the refiner writes."""

        def __call__(self, batch: Sequence[str], /) -> list[Any]:
            if "spoon" in batch:
                raise RuntimeError
            return super().__call__(batch)

    guard = Guard(inputs=[Moody("knife")], refiner=SwapRefiner({"knife": "spoon"}), policy=llm("refine"))
    with pytest.raises(CheckFailed):
        guard(echo)("knife")


def test_span_outside_the_text_is_an_error_of_that_item_alone() -> None:
    class Astray(WordCheck):
        """Says of long texts that something stands behind their end."""

        def __call__(self, batch: Sequence[str], /) -> list[Any]:
            return [
                Finding({"bad": 1.0 if len(t) > 2 else 0.0}, (Span(0, 2 * len(t) - 2, "bad"),)) for t in batch
            ]

    long, short = Guard(inputs=[Astray("")]).check_input(["long", "ok"])
    assert (long.failed, short.action) == (True, Action.ALLOW)
    assert long.verdicts[0].error == "gave a span outside 0 to 4"


def test_items_tried_again_alone_share_the_total_time() -> None:
    class Slow(FailingCheck):
        """Fails after a twentieth of a second."""

        def __call__(self, batch: Sequence[Any], /) -> list[Any]:
            time.sleep(0.05)
            return super().__call__(batch)

    started = time.perf_counter()
    reports = Guard(inputs=[Slow()], policy=policy(total_timeout_s=0.12)).check_input(
        [str(i) for i in range(40)]
    )
    assert time.perf_counter() - started < 1  # 40 tries would take 2 s
    assert all(r.failed for r in reports)


@pytest.mark.parametrize("threshold", [float("nan"), -0.1, 1.5])
def test_calibrated_threshold_that_is_no_probability_is_refused(threshold: float) -> None:
    check = ScoreCheck({"x": {"bad": 1.0}})
    check.operating_points = {"standard": {"bad": threshold}}  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"'bad' at the operating point 'standard'; it must be in \[0, 1\]"):
        Guard(inputs=[check], policy=policy(operating_point="standard")).check_input("x")


def test_operating_point_that_a_calibrated_check_does_not_know_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    check = ScoreCheck({"x": {"bad": 0.4}})
    check.operating_points = {"standard": {"bad": 0.3}}  # type: ignore[attr-defined]
    Guard(inputs=[check], policy=policy(operating_point="standrad")).check_input("x")
    assert "point=standrad known=standard" in caplog.text


@pytest.mark.parametrize("kind", ["input", "output", "stream"])
def test_event_loop_goes_on_while_another_thread_loads_a_model(kind: str) -> None:
    guard = Guard(inputs=[WordCheck("knife")], outputs=[WordCheck("knife")])
    loading, loaded = threading.Event(), threading.Event()

    def load() -> bool:
        with guard._loaded.lock:
            loading.set()
            return loaded.wait(3)  # told by the loop, if that goes on

    async def words() -> AsyncIterator[str]:
        yield "spoon"

    async def ask() -> None:
        if kind == "input":
            await guard.acheck_input("x")
        elif kind == "output":
            await guard.acheck_output("x")
        else:
            assert [text async for text in guard.astream(words())] == ["spoon"]

    async def run() -> bool:
        other = asyncio.get_running_loop().run_in_executor(None, load)
        await asyncio.to_thread(loading.wait)
        asyncio.get_running_loop().call_later(0.05, loaded.set)
        await ask()
        return await other

    assert asyncio.run(run())


def test_content_is_not_in_what_the_flow_shows_of_itself() -> None:
    shown = [
        Ask({"prompt": "secret"}),
        Item({"prompt": "secret"}, output="secret"),
        Outcome([["secret"]], []),
        text_piece("prompt", "secret", Policy()),
    ]
    assert "secret" not in repr(shown)


def test_errors_come_back_from_another_process_as_they_were() -> None:
    with pytest.raises(Blocked) as caught:
        Guard(outputs=[WordCheck("KNIFE")])(shout)(["a knife", "a spoon"])
    errors = [
        caught.value,
        CheckFailed("toxic", "failed with ValueError"),
        PackNotFound("toxic", ["here"]),
        MissingExtra("torch", extra="torch"),
        UnknownName("preset", "strickt", ["strict"]),
    ]
    for error in errors:
        twin = pickle.loads(pickle.dumps(error))
        assert (type(twin), str(twin), vars(twin)) == (type(error), str(error), vars(error))


def test_word_list_that_a_policy_file_names_may_stand_beside_it(tmp_path: Path) -> None:
    (tmp_path / "rude.txt").write_text("scoundrel\n", encoding="utf-8")
    (tmp_path / "policy.yaml").write_text(
        "input: {llm: {checks: ['blocklist:rude.txt']}}\n", encoding="utf-8"
    )
    guard = Guard.from_file(tmp_path / "policy.yaml")
    assert [r.blocked for r in guard.check_input(["a loaf", "you scoundrel"])] == [False, True]


def test_refiner_that_wants_an_argument_says_so() -> None:
    pytest.importorskip("torch", reason="torch is not installed (extra torch)")
    rules = {"refiner": "causal-lm", "input": {"llm": {"action": "refine"}}}
    with pytest.raises(ValueError, match="refiner 'causal-lm' must be name:argument"):
        Guard(inputs=[WordCheck("knife")], policy=policy(**rules)).check_input("a knife")


def test_decorator_finds_what_its_policy_file_names_beside_it(tmp_path: Path) -> None:
    (tmp_path / "rude.txt").write_text("scoundrel\n", encoding="utf-8")
    file = tmp_path / "policy.yaml"
    file.write_text("input: {llm: {checks: ['blocklist:rude.txt']}}\n", encoding="utf-8")
    with pytest.raises(Blocked):
        safeguard.guard(echo, policy=file)("you scoundrel")


def test_rewrite_that_was_refused_is_in_no_report() -> None:
    guard = Guard(
        inputs=[WordCheck("knife", "dagger")],
        refiner=SwapRefiner({"knife": "dagger"}),
        policy=Policy.from_data({"input": {"llm": {"action": "refine"}}}),
    )
    (report,) = guard.check_input("a knife")
    assert (report.blocked, report.revised_prompt) == (True, None)
