"""A streamer between `generate()` and the caller's: tokens go on only when their text was judged."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from safeguard import calls, flow
from safeguard.adapters.token_text import TokenText
from safeguard.driving import drive
from safeguard.held_text import HeldText
from safeguard.judging import Budget, strongest
from safeguard.types import Action, Report

_UNFINISHED = "\ufffd"  # what a decoder writes for the first bytes of a character
_LONGEST_CHARACTER = 8  # tokens; a byte-level character has four at most


class TokenStream(BaseStreamer):  # type: ignore[misc]  # transformers is untyped here
    """The tokens of one call on their way to the caller's streamer. All its state belongs to that call.

    Tokens are held back until the text they stand for may be released by the policy's `stream` rules. Once
    something is flagged nothing more goes on, and `stop` ends the generation at its next step.
    """

    def __init__(self, route: calls.Route, text: TokenText, streamer: Any) -> None:
        self._text, self._streamer = text, streamer
        self._held = HeldText(route)
        self._placeholder = route.policy.placeholder_text if route.policy.on_block == "replace" else ""
        self._expected: torch.Tensor | None = None
        self._prompt: torch.Tensor | None = None
        self._begun = self._ended = False
        self._ids: list[int] = []
        self._from = self._read = 0  # tokens that the next text is decoded from, and those already read
        self._chars = self._released = 0
        self._unread: list[torch.Tensor] = []  # tokens whose text is not known yet
        self._waiting: deque[tuple[torch.Tensor, int]] = deque()  # tokens, and where their text ends
        self._judged: str | None = None

    def expect(self, prompt: torch.Tensor | None, shown: torch.Tensor | None) -> None:
        """Say which tokens come first, and which the caller's streamer is to see in their place."""
        self._expected, self._prompt = prompt, shown

    def stop(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """The stopping criterion: true for all rows, (batch,), once something was flagged."""
        return torch.full(
            (input_ids.shape[0],), self._held.stopped, dtype=torch.bool, device=input_ids.device
        )

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then new tokens; hands on what may be released."""
        if not self._begun:
            self._begun = True
            if self._is_prompt(value):
                self._streamer.put(value if self._prompt is None else self._prompt.cpu())
                return
        if self._held.stopped or self._ended:
            return
        new = [int(i) for i in value.flatten().tolist()]
        self._ids += new
        self._unread.append(value)
        if chunk := self._new_text():
            self._chars += len(chunk)
            self._waiting += [(v, self._chars) for v in self._unread]
            self._unread.clear()
            self._release(len(drive(self._held.feed(chunk))))

    def end(self) -> None:
        """Judge the whole text, hand on the rest, and end the caller's stream."""
        if self._ended:
            return
        self._ended = True
        if not self._held.stopped:
            self._judged = self._text.decode(self._ids)
            drive(self._held.finish(self._judged))
        if not self._held.stopped:
            for value in [*(v for v, _ in self._waiting), *self._unread]:
                self._streamer.put(value)
        elif self._placeholder:
            for id_ in self._text.encode(self._placeholder):
                self._streamer.put(torch.tensor([id_]))
        self._waiting.clear()
        self._unread.clear()
        self._streamer.end()

    def close(self, made: str) -> None:
        """Look at what the call returns; judged again where it is not what was streamed."""
        self.end()
        if not self._held.stopped and made != self._judged:
            self._judged = made
            drive(self._held.finish(made))

    def refuse(self, prompt: torch.Tensor | None) -> None:
        """End the caller's stream for a prompt that was refused, so that whoever reads it does not wait."""
        if self._placeholder:
            if prompt is not None:
                self._streamer.put(prompt.cpu())
            for id_ in self._text.encode(self._placeholder):
                self._streamer.put(torch.tensor([id_]))
        self.abandon()

    def abandon(self) -> None:
        """End the caller's stream without what is held back."""
        if not self._ended:
            self._ended = True
            self._streamer.end()

    def report(self, route: calls.Route, ask: calls.Ask, item: calls.Item, ms: float) -> Report:
        """The report on prompt and text."""
        action = strongest(self._held.verdicts)
        if not action.passes:
            action = Action.BLOCK  # what was released cannot be cut or made again
        elif item.refined:
            action = Action.REFINE
        else:
            action = max(action, item.asked, key=lambda a: a.strength)
        verdicts = [*item.verdicts, *self._held.verdicts]
        return calls.make_report(
            route, ask, item.texts, verdicts, action, refined=item.refined, ms=ms + self._held.spent_ms
        )

    def _is_prompt(self, value: torch.Tensor) -> bool:
        if self._expected is None:  # no tokens were given: one for the beginning of the text, or none at all
            return bool(value.dim() == 2 and value.shape[1] <= 1)
        same = value.shape == self._expected.shape
        return bool(same and torch.equal(value.cpu(), self._expected.cpu()))

    def _new_text(self) -> str:
        """What the new tokens add to the text; nothing while they end within a character."""
        before = self._text.decode(self._ids[self._from : self._read])
        now = self._text.decode(self._ids[self._from :])
        if now.endswith(_UNFINISHED) and len(self._ids) - self._read < _LONGEST_CHARACTER:
            return ""
        self._from, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def _release(self, chars: int) -> None:
        """Hand on the tokens whose text ends within what may be released."""
        self._released += chars
        while self._waiting and self._waiting[0][1] <= self._released:
            self._streamer.put(self._waiting.popleft()[0])


def run(route: calls.Route, job: Any, streamer: Any) -> calls.Outcome:
    """A guarded call with a streamer: one prompt, one continuation, nothing made a second time."""
    if len(job.asks) != 1 or job.outputs != 1:
        raise ValueError(
            f"a streamer takes one prompt and one sequence, got {len(job.asks)} prompts x {job.outputs}"
        )
    stream = TokenStream(route, job.text, streamer)
    ask: calls.Ask = job.asks[0]
    try:
        budget = Budget(route.policy)
        (item,) = drive(flow.judge_asks(route, job.asks, budget))
        if item.asked is Action.BLOCK:
            stream.refuse(job.ids)
            report = calls.make_report(
                route, ask, item.texts, item.verdicts, Action.BLOCK, ms=budget.spent_ms
            )
            return calls.Outcome([[job.placeholder(None)]], [[report]])
        rows: Sequence[Any] = job.first([item.texts], stream)[0]
        stream.close(str(rows[0]))
    except BaseException:
        stream.abandon()
        raise
    report = stream.report(route, ask, item, budget.spent_ms)
    return calls.Outcome([[job.placeholder(None) if report.blocked else rows[0]]], [[report]])
