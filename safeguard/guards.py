"""The guard: checks, refiner and policy in one frozen object that is itself the decorator."""

from __future__ import annotations

import contextvars
import inspect
import logging
import os
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Generator, Iterable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar, overload

from safeguard import calls, flow, registry
from safeguard.driving import adrive, drive
from safeguard.errors import Blocked, CheckFailed, CheckTimeout, MissingExtra, PackNotFound, UnseenInput
from safeguard.judging import STUCK, TIMED_OUT, Piece, Surface, image_piece, text_piece
from safeguard.locks import ForkLock
from safeguard.policy import Policy
from safeguard.runtime.cache import CacheStatistics
from safeguard.runtime.checks import warm_up
from safeguard.runtime.wiring import Runtime
from safeguard.stats import Stats, Tally
from safeguard.streams import GuardedStream
from safeguard.types import Action, Check, Modality, Refiner, Report, Stage, Task

log = logging.getLogger(__name__)

T = TypeVar("T")
SurfaceName = tuple[Stage, str]

_captures: contextvars.ContextVar[tuple[list[Report], ...]] = contextvars.ContextVar("captures", default=())


@contextmanager
def capture() -> Iterator[list[Report]]:
    """Collect the reports of all guarded calls made inside the block.

    In this thread or task and what it starts.
    """
    reports: list[Report] = []
    token = _captures.set((*_captures.get(), reports))
    try:
        yield reports
    finally:
        _captures.reset(token)


class _Loaded:
    """Checks, surfaces and refiner of a guard, each loaded once, when first needed."""

    def __init__(self) -> None:
        self.lock = ForkLock()
        self.tally = Tally()
        self.checks: dict[str, Check[Any]] = {}
        self.runtime: Runtime | None = None
        self.surfaces: dict[SurfaceName, Surface] = {}
        self.refiner: Refiner | None = None
        self.routes: dict[tuple[Task, Modality], calls.Route] = {}


@dataclass(frozen=True)
class Guard:
    """Checks before and after, a refiner between. Call it on a pipeline, a model or a function to guard that.

    inputs and outputs are check objects used besides those that the policy names. on_report is called with
    every report of a guarded call, for audit; what it raises ends the call, after it got all of them. salt
    keys the content hashes in reports; give one to compare hashes between processes. folder is where files
    that the policy names are looked for. Safe to use from several threads and tasks.
    """

    inputs: Sequence[Check[Any]] = ()
    outputs: Sequence[Check[Any]] = ()
    refiner: Refiner | None = None
    policy: Policy = field(default_factory=Policy)
    on_report: Callable[[Report], None] | None = None
    device: str = "cpu"
    folder: Path | None = None
    salt: bytes = field(default_factory=lambda: os.urandom(16), repr=False)
    _loaded: _Loaded = field(default_factory=_Loaded, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 1 <= len(self.salt) <= 64:
            raise ValueError(f"salt must be 1 to 64 bytes, got {len(self.salt)}")
        for stage, checks, known in (
            ("inputs", self.inputs, ("text",)),
            ("outputs", self.outputs, ("text", "image")),
        ):
            for check in checks:
                if not callable(check) or not isinstance(getattr(check, "name", None), str):
                    raise TypeError(
                        f"{stage} take checks (name, modality, callable), got {type(check).__name__}"
                    )
                if check.modality not in known:  # it would never be asked
                    raise ValueError(
                        f"{stage} take checks of modality {' or '.join(known)}, "
                        f"got {check.name!r} of modality {check.modality!r}"
                    )

    @classmethod
    def from_preset(cls, name: str = "standard", **parts: Any) -> Self:
        """The guard of a policy that ships with the package.

        Parts are fields such as `inputs` or `on_report`.
        """
        return cls(policy=Policy.preset(name), **parts)

    @classmethod
    def from_file(cls, path: str | Path, **parts: Any) -> Self:
        """The guard of a policy file (YAML, TOML or JSON); files that it names may stand beside it."""
        return cls(policy=Policy.from_file(path), folder=Path(path).parent, **parts)

    # --- wrap ---------------------------------------------------------------------------------

    def __call__(self, target: T, /, **how: Any) -> T:
        """Guard `target`: a diffusers pipeline or transformers model in place, a function by a guarded twin.

        how goes to the adapter: `prompt` (name of the prompt argument), `task` ("t2i" or "llm"), `tokenizer`,
        ... Models named by the policy are loaded now, so that what is missing is said here and not in the
        first call. Raises TypeError for what cannot be guarded.
        """
        known = registry.names("adapters")
        for base in type(target).__mro__:
            name = f"{base.__module__.split('.')[0]}.{base.__qualname__}"
            if name in known:
                return registry.load("adapters", name)(target, self, **how)  # type: ignore[no-any-return]
        if (callable(target) or isinstance(target, classmethod)) and not isinstance(target, type):
            wrap = registry.load("adapters", "builtins.function")
            return wrap(target, self, **how)  # type: ignore[no-any-return]
        raise TypeError(
            f"cannot guard {type(target).__name__}; "
            "give a function, a diffusers pipeline or a transformers model"
        )

    # --- check only: never generates ----------------------------------------------------------

    def check_input(self, texts: str | Sequence[str], *, task: Task = "llm") -> list[Report]:
        """Judge prompts, one report each; where the policy refines, the report has the revised prompt."""
        asks = [calls.Ask({"prompt": text}) for text in _as_list(texts)]
        return self.tell(drive(flow.input_reports(self.route(task, "text"), self._limited(asks))))

    async def acheck_input(self, texts: str | Sequence[str], *, task: Task = "llm") -> list[Report]:
        """`check_input` for an event loop."""
        import asyncio

        asks = [calls.Ask({"prompt": text}) for text in _as_list(texts)]
        route = await asyncio.to_thread(self.route, task, "text")  # the first time it loads models
        return self.tell(await adrive(flow.input_reports(route, self._limited(asks))))

    def check_output(self, items: Any, *, modality: Modality = "text") -> list[Report]:
        """Judge results, one report each: texts, or images (PIL, arrays, tensors), alone or in a list."""
        pieces = self._pieces(self._limited(_as_list(items)), modality)
        return self.tell(drive(flow.output_reports(self.output_route(modality), pieces)))

    async def acheck_output(self, items: Any, *, modality: Modality = "text") -> list[Report]:
        """`check_output` for an event loop."""
        import asyncio

        listed = self._limited(_as_list(items))
        pieces = await asyncio.to_thread(self._pieces, listed, modality)
        route = await asyncio.to_thread(self.output_route, modality)
        return self.tell(await adrive(flow.output_reports(route, pieces)))

    def stream(self, chunks: Iterable[T]) -> Generator[T, None, None]:
        """Yield streamed text only after it was judged with what follows it, by the policy's `stream` rules.

        Chunks are strings, or objects with `choices` as chat APIs stream them. Raises Blocked at the first
        flagged text, after closing the source.
        """
        return GuardedStream(self, self.output_route("text"), calls.Ask({})).run(chunks)

    async def astream(self, chunks: AsyncIterable[T]) -> AsyncGenerator[T, None]:
        """`stream` for an event loop."""
        import asyncio

        route = await asyncio.to_thread(self.output_route, "text")
        async with aclosing(GuardedStream(self, route, calls.Ask({})).arun(chunks)) as texts:
            async for text in texts:
                yield text

    def _pieces(self, items: Sequence[Any], modality: Modality) -> list[Piece]:
        if modality == "text":
            return [text_piece("output", item, self.policy) for item in items]
        return [image_piece(item) for item in items]

    def _limited(self, items: list[T]) -> list[T]:
        if len(items) > self.policy.max_items:
            raise ValueError(
                f"a call may have at most {self.policy.max_items} items (max_items), got {len(items)}"
            )
        return items

    def warmup(self) -> None:
        """Load all that the policy names and run it once, so that the first caller does not wait for it.

        Raises what is raised for models that are missing or cannot run.
        """
        with self._loaded.lock:
            surfaces = [
                self._surface("input", "t2i", "text"),
                self._surface("input", "llm", "text"),
                self._surface("output", "text", "text"),
                self._surface("output", "image", "image"),
            ]
            refines = any(_refines(surface) for surface in surfaces)
            refiner = self._refiner() if refines else None
        for check in {id(check): check for surface in surfaces for check in surface.checks}.values():
            warm_up(check)
        _prepare(refiner)

    def refiner_in_use(self) -> str | None:
        """Name of the refiner that flagged prompts go to, None where the policy names none; loads it.

        With `refiner: default` this tells whether the trained refiner serves, or the span softener instead.
        """
        with self._loaded.lock:
            refiner = self._refiner()
        return None if refiner is None else refiner.name

    def cache_statistics(self) -> CacheStatistics | None:
        """Hits, misses and size of the result cache; None where the policy keeps none."""
        with self._loaded.lock:
            return self._runtime().statistics

    # --- for adapters -------------------------------------------------------------------------

    def route(self, task: Task, modality: Modality) -> calls.Route:
        """What a call of this kind goes through; loads what it needs the first time."""
        found = self._loaded.routes.get((task, modality))
        if found is not None:
            return found
        with self._loaded.lock:
            inputs = self._surface("input", task, "text")
            outputs = self._surface("output", modality, modality)
            refines = _refines(inputs) or _refines(outputs)
            refiner = self._refiner() if refines or modality == "image" else None
            if not refines and not getattr(refiner, "always_judge", False):
                refiner = None
            found = calls.Route(self.policy, inputs, outputs, refiner, self.salt)
            self._loaded.routes[task, modality] = found
            return found

    def prepare(self, task: Task, modality: Modality) -> calls.Route:
        """`route` for what is being guarded: what has to be built first is built now, and not in a call."""
        found = self.route(task, modality)
        _prepare(found.refiner)
        return found

    def tell(self, reports: list[Report]) -> list[Report]:
        """Count reports, hand them to the `capture` blocks around and to `on_report`; returns them."""
        self._loaded.tally.add(reports)
        for captured in _captures.get():
            captured.extend(reports)
        for report in reports:
            if not report.action.passes:
                log.info("%s: %s policy=%s", report.action.value, report.summary(), report.policy)
        if self.on_report is not None:
            _hand_on(reports, self.on_report)
        return reports

    def tell_unfinished(self, reports: list[Report]) -> None:
        """`tell` for a call that ends in an error, which goes on whatever the sink says."""
        try:
            self.tell(reports)
        except Exception as exc:
            log.error("reports of a broken call were not taken: error=%s", type(exc).__name__)

    def stats(self) -> Stats:
        """How many items passed, were changed, blocked or could not be judged, since this guard was made."""
        return self._loaded.tally.stats()

    def settle(self, reports: list[Report], output: T) -> T:
        """Tell the reports; then return the output.

        Or raise when something is blocked and the policy says raise.
        """
        self.tell(reports)
        if self.policy.on_block == "replace":
            return output
        blocked = [r for r in reports if r.action is Action.BLOCK]
        if not blocked:
            return output
        judged = [r for r in blocked if not r.failed]
        if judged:
            raise Blocked(reports, output)
        raise _failure(blocked[0], reports, output)

    def output_route(self, modality: Modality) -> calls.Route:
        """A route for judging results alone: no input check needs to be there."""
        with self._loaded.lock:
            outputs = self._surface("output", modality, modality)
        nothing = Surface("input", "text", self.policy.input.llm, (), self.policy)
        return calls.Route(self.policy, nothing, outputs, None, self.salt)

    def _surface(self, stage: Stage, name: str, modality: Modality) -> Surface:
        key = (stage, name)
        if key not in self._loaded.surfaces:
            rules = self.policy.rules(stage, name)  # type: ignore[arg-type]  # rules() refuses other names
            own = self.inputs if stage == "input" else self.outputs
            checks = [self._runtime().wrap(c) for c in own if c.modality == modality]
            checks += [self._check(spec) for spec in rules.checks]
            for spec in rules.optional_checks:
                try:
                    checks.append(self._check(spec))
                except (PackNotFound, MissingExtra):
                    log.info("optional check is not installed: check=%s", spec)
            self._loaded.surfaces[key] = Surface(stage, modality, rules, checks, self.policy)
        return self._loaded.surfaces[key]

    def _check(self, spec: str) -> Check[Any]:
        if spec not in self._loaded.checks:
            from safeguard.checks.loading import load_check

            options = self.policy.runtime.torch_options
            loaded = load_check(self._beside(spec), device=self.device, options=options)
            self._loaded.checks[spec] = self._runtime().wrap(loaded)
        return self._loaded.checks[spec]

    def _runtime(self) -> Runtime:
        if self._loaded.runtime is None:
            self._loaded.runtime = Runtime(self.policy, self.device)
        return self._loaded.runtime

    def _beside(self, spec: str) -> str:
        """`kind:file` with a relative file that stands in our folder, as a full path; else as it is."""
        kind, _, argument = spec.partition(":")
        if self.folder is None or not argument or not (self.folder / argument).exists():
            return spec
        return f"{kind}:{self.folder / argument}"

    def _refiner(self) -> Refiner | None:
        if self.refiner is not None or self.policy.refiner is None:
            return self.refiner
        if self._loaded.refiner is None:
            name, _, argument = self.policy.refiner.partition(":")
            factory = registry.load("refiners", name)
            given = (argument,) if argument else ()
            try:
                inspect.signature(factory).bind(*given)
            except TypeError as exc:
                raise ValueError(
                    f"refiner {self.policy.refiner!r} must be name:argument as its factory wants: {exc}"
                ) from exc
            self._loaded.refiner = factory(*given)
        return self._loaded.refiner


def _refines(surface: Surface) -> bool:
    rules = surface.rules
    return Action.REFINE in (rules.action, *(rule.action for rule in rules.categories.values()))


def _prepare(refiner: Refiner | None) -> None:
    """Have a refiner make what its first run would have to wait for; most need nothing."""
    own = getattr(refiner, "prepare", None)
    if own is not None:
        own()


def _hand_on(reports: Sequence[Report], sink: Callable[[Report], None]) -> None:
    """Give the sink all reports, then raise the first thing that it raised."""
    failures: list[Exception] = []
    for report in reports:
        try:
            sink(report)
        except Exception as exc:
            log.error("on_report failed: error=%s", type(exc).__name__)
            failures.append(exc)
    if failures:
        raise failures[0]


def _failure(first: Report, reports: list[Report], output: Any) -> CheckFailed:
    verdict = next(v for v in first.final if v.error and not v.action.passes)
    kind = CheckFailed
    if verdict.error in (TIMED_OUT, STUCK):
        kind = CheckTimeout
    elif verdict.check == "safeguard":
        kind = UnseenInput
    return kind(verdict.check, verdict.error or "failed", reports=reports, output=output)


def _as_list(items: Any) -> list[Any]:
    if isinstance(items, list | tuple):
        return list(items)
    return [items]


@overload
def guard(target: T, /, **how: Any) -> T: ...
@overload
def guard(**how: Any) -> Callable[[T], T]: ...
def guard(
    target: Any = None,
    /,
    *,
    preset: str | None = None,
    policy: Policy | str | Path | None = None,
    inputs: Sequence[Check[Any]] = (),
    outputs: Sequence[Check[Any]] = (),
    refiner: Refiner | None = None,
    on_report: Callable[[Report], None] | None = None,
    device: str = "cpu",
    **how: Any,
) -> Any:
    """Guard a pipeline, a model or a function; without a target, the decorator that does.

    preset is "standard" unless a policy (an object or a file) is given. how goes to the adapter, see
    `Guard.__call__`.
    """
    if preset is not None and policy is not None:
        raise ValueError("give preset or policy, not both")
    folder: Path | None = None
    if isinstance(policy, str | Path):
        folder, policy = Path(policy).parent, Policy.from_file(policy)
    chosen = policy or Policy.preset(preset or "standard")
    made = Guard(inputs, outputs, refiner, chosen, on_report, device, folder)
    if target is not None:
        return made(target, **how)

    def decorate(wanted: T) -> T:
        return made(wanted, **how)

    return decorate
