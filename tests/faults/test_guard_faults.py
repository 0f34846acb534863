"""The rest of the guard's refusals: what cannot be seen, asked for, loaded or closed."""

from __future__ import annotations

import io
import sys
import types
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from safeguard import Action, Blocked, Finding, Guard, PackError, PackNotFound, Span, capture
from safeguard.calls import Ask, cut_spans
from safeguard.driving import drive
from safeguard.flow import input_reports
from safeguard.packs import carrier_names, open_file, read_pack, resolve
from safeguard.testing import BrightCheck, ScoreCheck, SwapRefiner, WordCheck
from tests.faults.faults import Told, is_usable
from tests.policies import echo, llm, policy
from tests.tiny_packs import rude_pack


def judged(guard: Guard, ask: Ask) -> Any:
    (report,) = drive(input_reports(guard.route("llm", "text"), [ask]))
    return report


# --- what no check can see ----------------------------------------------------------------------


def test_argument_that_no_check_can_see_is_withheld_and_counted_as_a_failure() -> None:
    guard = Guard(inputs=[WordCheck("knife")])
    report = judged(guard, Ask({"prompt": "good"}, unseen=("prompt_embeds",)))
    assert (report.action, report.failed) == (Action.BLOCK, True)
    assert report.final[-1].error == "prompt_embeds cannot be seen by any check"
    assert is_usable(guard)


def test_argument_that_no_check_can_see_is_withheld_where_errors_pass() -> None:
    guard = Guard(inputs=[WordCheck("knife")], policy=policy(on_error="allow"))
    assert judged(guard, Ask({"prompt": "good"}, unseen=("prompt_embeds",))).blocked


def test_flagged_negative_prompt_is_blocked_and_never_rewritten() -> None:
    refiner = SwapRefiner({"knife": "spoon"})
    guard = Guard(inputs=[WordCheck("knife")], refiner=refiner, policy=llm("refine"))
    report = judged(guard, Ask({"prompt": "a spoon", "negative_prompt": "a knife"}))
    assert (report.action, refiner.requests) == (Action.BLOCK, [])


def test_picture_that_is_cut_off_is_withheld_alone() -> None:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(file, "png")
    broken = Image.open(io.BytesIO(file.getvalue()[:2000]))  # opens, and fails when its pixels are wanted
    black = np.zeros((64, 64, 3), np.uint8)
    for parts in ({}, {"image_tiles": 2}):
        guard = Guard(outputs=[BrightCheck()], policy=policy(**parts))
        reports = guard.check_output([broken, black], modality="image")
        assert [r.failed for r in reports] == [True, False]


def test_picture_that_takes_more_memory_than_there_is_is_withheld_alone() -> None:
    class Huge(Image.Image):
        def load(self) -> Any:
            raise MemoryError

    huge = Huge()
    huge._mode, huge._size = "RGB", (64, 64)
    black = np.zeros((64, 64, 3), np.uint8)
    guard = Guard(outputs=[BrightCheck()], policy=policy(image_tiles=2))
    reports = guard.check_output([huge, black], modality="image")
    assert [r.failed for r in reports] == [True, False]
    assert reports[0].verdicts[0].error == "cannot be looked at closely (MemoryError)"


# --- verdicts ---------------------------------------------------------------------------------


def test_the_strongest_of_several_flagged_categories_decides_and_ignored_places_stay() -> None:
    found = Finding({"a": 0.9, "b": 0.9, "c": 0.1}, (Span(0, 1, "a"), Span(1, 2, "c")))
    guard = Guard(inputs=[Told(lambda batch: [found] * len(batch))])
    (report,) = guard.check_input("text")
    assert (report.flagged, [s.category for s in report.spans]) == (("a", "b"), ["a"])


def test_overlapping_places_are_cut_as_one() -> None:
    # 0..4 and 2..6 are one place, 8..9 another
    spans = [Span(2, 6, "a"), Span(0, 4, "b"), Span(8, 9, "a")]
    assert cut_spans("0123456789", spans, "*") == "*67*9"


# --- what cannot be asked for -------------------------------------------------------------------


@pytest.mark.parametrize("salt", [b"", b"x" * 65])
def test_salt_of_a_wrong_size_is_refused(salt: bytes) -> None:
    with pytest.raises(ValueError, match=f"salt must be 1 to 64 bytes, got {len(salt)}"):
        Guard(salt=salt)


def test_too_many_items_are_refused_and_the_next_call_passes() -> None:
    guard = Guard(inputs=[WordCheck("knife")], policy=policy(max_items=1))
    with pytest.raises(ValueError, match="a call may have at most 1 items"):
        guard.check_input(["a", "b"])
    assert is_usable(guard)


def test_optional_check_that_is_not_installed_is_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    made = policy(input={"llm": {"optional_checks": ["no/such-pack"]}})
    guard = Guard(inputs=[WordCheck("knife")], policy=made)
    with caplog.at_level("INFO", "safeguard"):
        assert is_usable(guard)
    assert "optional check is not installed: check=no/such-pack" in caplog.text


def test_optional_check_that_was_altered_is_not_left_out(tmp_path: Path) -> None:
    folder = rude_pack(tmp_path / "pack")
    (folder / "tokenizer.json").write_text("{}")
    guard = Guard(policy=policy(input={"llm": {"optional_checks": [str(folder)]}}))
    with pytest.raises(PackError, match=r"tokenizer.json was altered"):
        guard(echo)


def test_check_of_two_surfaces_is_loaded_once(tmp_path: Path) -> None:
    folder = str(rude_pack(tmp_path / "pack"))
    guard = Guard(policy=policy(input={"llm": {"checks": [folder]}, "t2i": {"checks": [folder]}}))
    one, other = (guard.route(task, "text").inputs.checks[0] for task in ("llm", "t2i"))
    assert one is other


def test_refiner_without_the_argument_that_it_needs_is_said_when_the_target_is_guarded() -> None:
    made = policy(refiner="causal-lm", input={"llm": {"action": "refine"}})
    with pytest.raises(ValueError, match="refiner 'causal-lm' must be name:argument as its factory wants"):
        Guard(inputs=[WordCheck("knife")], policy=made)(echo)


# --- streams that cannot be closed ---------------------------------------------------------------


class Stubborn:
    """A source that cannot be closed."""

    def __init__(self, *chunks: str) -> None:
        self._chunks = iter(chunks)

    def __iter__(self) -> Iterator[str]:
        return self._chunks

    def close(self) -> None:
        raise OSError("cannot be closed")


def test_stopped_stream_that_cannot_be_closed_is_still_blocked_and_reported() -> None:
    guard = Guard(outputs=[WordCheck("knife")])
    with capture() as reports, pytest.raises(Blocked):
        list(guard.stream(Stubborn("a knife ")))
    assert (len(reports), guard.stats().blocked) == (1, 1)


def test_clean_stream_that_cannot_be_closed_says_so() -> None:
    with pytest.raises(OSError, match="cannot be closed"):
        list(Guard(outputs=[WordCheck("knife")]).stream(Stubborn("a spoon ")))


def test_asynchronous_source_without_a_way_to_close_it_is_read() -> None:
    import asyncio

    class Bare:
        def __init__(self) -> None:
            self._left = ["a ", "spoon"]

        def __aiter__(self) -> AsyncIterator[str]:
            return self

        async def __anext__(self) -> str:
            if not self._left:
                raise StopAsyncIteration
            return self._left.pop(0)

    async def read() -> str:
        guard = Guard(outputs=[WordCheck("knife")])
        return "".join([chunk async for chunk in guard.astream(Bare())])

    assert asyncio.run(read()) == "a spoon"


# --- packs ------------------------------------------------------------------------------------


def test_file_that_is_not_there_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(PackError, match=r"safeguard.json cannot be read: No such file or directory"):
        read_pack(tmp_path)
    with pytest.raises(PackError, match="it is no plain file"):
        open_file(tmp_path)


def test_half_imported_carrier_package_is_one_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    import json
    from importlib import resources

    name = carrier_names()[0]
    file = resources.files("safeguard") / "data" / "packs" / f"{name}.json"
    module = json.loads(file.read_text(encoding="utf-8"))["carrier"]["module"]
    half = types.ModuleType(module)
    half.__spec__ = None  # as find_spec refuses it
    monkeypatch.setitem(sys.modules, module, half)
    with pytest.raises(PackNotFound, match="not installed"):
        resolve(name)


def test_check_on_scores_that_are_not_judged_passes() -> None:
    guard = Guard(
        inputs=[ScoreCheck({}, {"other": 1.0})], policy=policy(input={"llm": {"ignore": ["other"]}})
    )
    assert guard.check_input("text")[0].action is Action.ALLOW
