"""Every exception the package raises, as one tree.

SafeguardError
├── Blocked             a policy refused the content (carries reports and the safe remainder)
├── CheckFailed         content could not be judged, so nothing was let through
│   ├── CheckTimeout    a check or the whole call ran out of its time
│   └── UnseenInput     input or output of a form that no check can see
├── PolicyError         a policy file that does not say something valid
├── PackError           a model pack that is missing, altered or malformed
│   └── PackNotFound    no pack of that name in any place looked in
├── BackendError        a model file cannot run on the device asked for
├── ExportError         a model that cannot be exported (names its class, the operator and the reason)
│   └── ParityError     an export that does not say what its model says
├── QueueFull           more work waits for a model than may wait (back-pressure)
├── QueueClosed         a micro-batcher that was closed takes no more work
├── RefinerError        a refiner gave nothing that can be used
├── MissingExtra        an optional dependency is not installed
└── UnknownName         a name is in no registry
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safeguard.types import Report

DISTRIBUTION = "safeguard-sdk"
"""What `pip install` calls us; the plain name is taken on PyPI."""


class SafeguardError(Exception):
    """Base class: `except SafeguardError` catches all of ours and nothing else."""

    def __reduce__(self) -> tuple[Any, ...]:
        # the default calls the class with the message alone, which breaks the pool that it is sent through
        return _restored, (type(self), self.args, self.__dict__)


def _restored(kind: type[SafeguardError], args: tuple[Any, ...], state: Mapping[str, Any]) -> SafeguardError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class Blocked(SafeguardError):
    """A policy refused the content.

    reports: one per item of the call, in order; `report` is the first one that is blocked. output: what the
    call would have returned, with only the blocked items replaced; None where nothing was made.
    """

    def __init__(self, reports: Sequence[Report], output: Any = None) -> None:
        self.reports = tuple(reports)
        self.output = output
        self.report = next((r for r in self.reports if r.blocked), self.reports[0])
        super().__init__(self.report.summary())


class CheckFailed(SafeguardError):
    """Content could not be judged, so nothing was let through; `why` names what was raised, never its words.

    Carries `check`, the name of what failed, and, when raised by a guarded call, `reports` and `output` as in
    `Blocked`.
    """

    def __init__(
        self, check: str, why: str = "failed", *, reports: Sequence[Report] = (), output: Any = None
    ) -> None:
        self.check = check
        self.why = why
        self.reports = tuple(reports)
        self.output = output
        what = why if isinstance(self, UnseenInput) else f"check {check!r} {why}"
        super().__init__(f"{what}, so nothing was let through (policy on_error: block)")


class CheckTimeout(CheckFailed):
    """A check, or the whole guarded call, ran out of its time."""


class UnseenInput(CheckFailed):
    """An input or output of a form that no check can see: prompt embeddings, unknown types, oversize text."""


class PolicyError(SafeguardError, ValueError):
    """A policy file that does not say something valid; the message names the key and what would be right."""


class PackError(SafeguardError):
    """A model pack that is altered, malformed or of another kind than asked for."""


class PackNotFound(PackError):
    """No pack of that name; `places` names each place looked in."""

    def __init__(self, name: str, places: Sequence[str], hint: str = "") -> None:
        self.name = name
        self.places = tuple(places)
        looked = "".join(f"\n  - {place}" for place in self.places)
        super().__init__(f"no model pack named {name!r}; looked in:{looked}" + (f"\n{hint}" if hint else ""))


class BackendError(SafeguardError):
    """A model file cannot run on the device or provider asked for; nothing else is tried in its place."""


class ExportError(SafeguardError):
    """A model that cannot be exported.

    model: its class. operator: what the target format has no form of, None where it is not one operator.
    """

    def __init__(self, model: str, reason: str, *, operator: str | None = None) -> None:
        self.model, self.reason, self.operator = model, reason, operator
        what = f"operator {operator}: " if operator else ""
        super().__init__(f"{model} cannot be exported: {what}{reason}")


class ParityError(ExportError):
    """An export that does not agree with its model, on the same inputs.

    tensor, shape: where; difference: the largest one, or the share of flipped decisions; limit: what would
    have been let through.
    """

    def __init__(
        self,
        tensor: str,
        shape: Sequence[int],
        difference: float,
        limit: float,
        *,
        what: str = "",
        advice: str = "",
    ) -> None:
        self.tensor, self.shape = tensor, tuple(shape)
        self.difference, self.limit = difference, limit
        text = f"{tensor} {self.shape} {what or 'differs'} by {difference:.3g}, more than {limit:.3g}"
        SafeguardError.__init__(self, text + (f"; {advice}" if advice else ""))


class QueueFull(SafeguardError):
    """More work waits for a model than may wait, so this call was turned away; come again later.

    Inside a guarded call it is a failure like any other: the policy's on_error decides.
    """

    def __init__(self, name: str, why: str) -> None:
        self.name, self.why = name, why
        super().__init__(f"the queue of {name!r} {why}; send less at once, or raise max_queue or max_wait_s")


class QueueClosed(SafeguardError):
    """A micro-batcher that was closed takes no more work."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"the queue of {name!r} was closed, so it takes no more work")


class RefinerError(SafeguardError):
    """A refiner gave nothing that can be used: wrong count, wrong type or no text."""


class MissingExtra(SafeguardError, ImportError):
    """An optional dependency is not installed; `command`, where it is none of our extras that brings it."""

    def __init__(self, module: str, extra: str, *, command: str = "") -> None:
        self.module, self.extra = module, extra
        command = command or f"pip install '{DISTRIBUTION}[{extra}]'"
        super().__init__(f"{module!r} is not installed; run: {command}")


class UnknownName(SafeguardError, KeyError):
    """A name that no registry knows."""

    def __init__(self, kind: str, name: str, known: Sequence[str]) -> None:
        self._message = f"no {kind} named {name!r}; known: {', '.join(known) or 'none'}"
        super().__init__(self._message)

    def __str__(self) -> str:  # KeyError would print the repr
        return self._message
