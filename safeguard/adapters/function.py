"""Guard any function, async function, generator or async generator that takes a prompt."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeVar, cast

from safeguard import calls, flow
from safeguard.adapters.in_place import kept
from safeguard.adapters.messages import is_chat, judged_turns, other_words
from safeguard.chunks import texts_of
from safeguard.driving import adrive, drive
from safeguard.errors import CheckFailed
from safeguard.guards import Guard
from safeguard.judging import Budget, Piece, image_piece, text_piece
from safeguard.policy import Policy
from safeguard.streams import GuardedStream
from safeguard.types import Action, Modality, Span, Task

log = logging.getLogger(__name__)

T = TypeVar("T")

PROMPT_NAMES = (
    "prompt",
    "prompts",
    "messages",
    "message",
    "query",
    "question",
    "instruction",
    "text",
    "texts",
)
"""Argument names taken for the prompt, best first, where the user names none."""

Reader = Callable[[Any], Any]


def wrap(
    target: T,
    guard: Guard,
    *,
    prompt: str | Sequence[str] | None = None,
    task: Task | None = None,
    output: Reader | None = None,
    stream: bool = False,
) -> T:
    """Return a twin of `target` that is guarded; `target` itself stays as it is.

    prompt: name of the argument, or names when there are several, the main one first; found by name when not
    given. Arguments with "prompt" in their name are judged as well. task: "llm" for text made from text,
    "t2i" for images; read from the return annotation when not given, else "llm". output: takes what is judged
    (text or image) out of the result, where the result is something else, such as a response object; of a
    stream, the text out of each chunk, None for a chunk without. stream: a plain function gives back an
    iterator, a coroutine function an async iterator, such as the response of a client asked to stream;
    generator functions need not say so. Chunks may be strings or objects with `choices` (`safeguard.chunks`).

    The prompt may be a text, a list of texts (the function then gives a list as long) or chat messages.
    Raises TypeError when it cannot be told which argument is the prompt.
    """
    func: Any = target
    if isinstance(func, staticmethod):
        inner = wrap(func.__func__, guard, prompt=prompt, task=task, output=output, stream=stream)
        return cast(T, staticmethod(inner))
    if isinstance(func, classmethod):
        raise TypeError("put @guard below @classmethod, so that it wraps the function itself")
    if getattr(func, "__safeguard__", None) is not None:
        raise TypeError(f"{_name(func)} is guarded already")
    signature = inspect.signature(func)
    names = _prompt_names(func, signature, prompt)
    if stream and task == "t2i":
        raise ValueError("only text can be streamed, got task 't2i'; leave out stream=True")
    how = task or _task_of(signature)
    modality: Modality = "image" if how == "t2i" else "text"
    guard.prepare(how, modality)  # what is missing is said now
    call = _Call(func, signature, names, guard, how, modality, output)
    kind = func if inspect.isroutine(func) or isinstance(func, functools.partial) else type(func).__call__
    if inspect.isasyncgenfunction(kind):
        twin: Any = call.async_stream
    elif inspect.isgeneratorfunction(kind):
        twin = call.stream
    elif inspect.iscoroutinefunction(kind):
        twin = call.async_opened if stream else call.async_once
    elif stream:
        twin = call.stream
    else:
        twin = call.once
    return _dressed(twin, func, guard)  # type: ignore[no-any-return]


def _dressed(method: Any, func: Any, guard: Guard) -> Any:
    """A plain function, so that it binds as a method and shows its own kind (async.

    Generator) to frameworks.
    """
    if inspect.isasyncgenfunction(method):

        async def guarded(*args: Any, **kwargs: Any) -> Any:
            async with aclosing(method(args, kwargs)) as texts:  # left early, the source is closed with it
                async for text in texts:
                    yield text
    elif inspect.isgeneratorfunction(method):

        def guarded(*args: Any, **kwargs: Any) -> Any:
            yield from method(args, kwargs)
    elif inspect.iscoroutinefunction(method):

        async def guarded(*args: Any, **kwargs: Any) -> Any:  # type: ignore[misc]
            return await method(args, kwargs)
    else:

        def guarded(*args: Any, **kwargs: Any) -> Any:
            return method(args, kwargs)

    if hasattr(func, "__name__"):
        functools.update_wrapper(guarded, func)
    else:  # a callable object or a partial
        guarded.__doc__ = func.__doc__
        guarded.__signature__ = inspect.signature(func)  # type: ignore[attr-defined]
    guarded.__safeguard__ = guard  # type: ignore[attr-defined]
    return guarded


def _name(func: Any) -> str:
    return str(getattr(func, "__qualname__", type(func).__name__))


def _prompt_names(
    func: Any, signature: inspect.Signature, wanted: str | Sequence[str] | None
) -> tuple[str, ...]:
    plain = [p.name for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    for p in signature.parameters.values():
        if p.kind is p.VAR_POSITIONAL and _says_prompt(p.name):
            raise TypeError(f"{_name(func)} takes its prompts as *{p.name}; give it one argument with a list")
    open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    if wanted is not None:
        names = (wanted,) if isinstance(wanted, str) else tuple(wanted)
        unknown = [n for n in names if n not in plain and not open_ended]
        if unknown or not names:
            raise TypeError(
                f"{_name(func)} has no argument {', '.join(unknown)}; it has {', '.join(plain) or 'none'}"
            )
    else:
        found = next((n for n in PROMPT_NAMES if n in plain), None)
        rest = [n for n in plain if n not in ("self", "cls")]
        if found is None and len(rest) == 1:
            found = rest[0]
        if found is None:
            raise TypeError(
                f"cannot tell which argument of {_name(func)} is the prompt; say guard(..., prompt='name'), "
                f"one of {', '.join(rest) or 'none'}"
            )
        names = (found,)
    return (*names, *(n for n in plain if _says_prompt(n) and n not in names))


def _says_prompt(name: str) -> bool:
    return "prompt" in name.lower()


def _task_of(signature: inspect.Signature) -> Task:
    annotation = signature.return_annotation
    text = (
        annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "") + str(annotation)
    )
    return "t2i" if any(word in text for word in ("Image", "ndarray", "Tensor")) else "llm"


def _only_place(signature: inspect.Signature, names: tuple[str, ...]) -> int | None:
    """Position of the prompt where it is the one argument to judge.

    Binding arguments costs more than all the rest.
    """
    parameters = list(signature.parameters.values())
    kinds = {p.kind for p in parameters}
    if len(names) != 1 or inspect.Parameter.VAR_KEYWORD in kinds or inspect.Parameter.VAR_POSITIONAL in kinds:
        return None
    place = [p.name for p in parameters].index(names[0])
    return place if parameters[place].kind is not inspect.Parameter.KEYWORD_ONLY else None


class _Call:
    """What is known of a guarded function; its methods are the kinds of function."""

    def __init__(
        self,
        func: Any,
        signature: inspect.Signature,
        names: tuple[str, ...],
        guard: Guard,
        task: Task,
        modality: Modality,
        output: Reader | None,
    ) -> None:
        self.func, self.signature, self.names = func, signature, names
        self.guard, self.task, self.modality, self.output = guard, task, modality, output
        self.position = _only_place(signature, names)

    def once(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        job = _FunctionJob(self, args, kwargs)
        outcome = drive(flow.run(self.guard.route(self.task, self.modality), job))
        return self.guard.settle(outcome.flat, job.assemble(outcome))

    async def async_once(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        job = _FunctionJob(self, args, kwargs, on_loop=True)
        outcome = await adrive(flow.run(self.guard.route(self.task, self.modality), job))
        return self.guard.settle(outcome.flat, job.assemble(outcome))

    def stream(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
        job = _FunctionJob(self, args, kwargs, streamed=True)
        route = self.guard.route(self.task, "text")
        (item,) = drive(flow.judge_asks(route, job.asks, Budget(route.policy)))
        if item.asked is Action.BLOCK:
            report = calls.make_report(route, job.asks[0], item.texts, item.verdicts, item.asked)
            yield self.guard.settle([report], route.policy.placeholder_text)
            return
        read = None if self.output is None else texts_of(self.output)
        yield from GuardedStream(self.guard, route, job.asks[0], item, read).run(job.call(item.texts))

    async def async_stream(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AsyncGenerator[Any, None]:
        job = _FunctionJob(self, args, kwargs, streamed=True)
        route = self.guard.route(self.task, "text")
        (item,) = await adrive(flow.judge_asks(route, job.asks, Budget(route.policy)))
        if item.asked is Action.BLOCK:
            report = calls.make_report(route, job.asks[0], item.texts, item.verdicts, item.asked)
            yield self.guard.settle([report], route.policy.placeholder_text)
            return
        source = job.call(item.texts)
        if inspect.isawaitable(source):  # of a coroutine function that gives back its stream
            source = await source
        read = None if self.output is None else texts_of(self.output)
        stream = GuardedStream(self.guard, route, job.asks[0], item, read).arun(source)
        async with aclosing(stream) as texts:
            async for text in texts:
                yield text

    async def async_opened(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AsyncGenerator[Any, None]:
        """What a coroutine function that gives back a stream gives back; nothing runs before it is read."""
        return self.async_stream(args, kwargs)


class _FunctionJob:
    """One call of a guarded function, as the flow sees it."""

    def __init__(
        self,
        call: _Call,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        on_loop: bool = False,
        streamed: bool = False,
    ) -> None:
        self._call, self.on_loop = call, on_loop
        self.task, self.modality = call.task, call.modality
        self._rows: int | None = None
        self._plain = (args, kwargs) if self._is_plain(args, kwargs) else None
        if self._plain is not None:
            return
        self._bound = call.signature.bind(*args, **kwargs)
        self._values = self._arguments()
        lengths = {len(v) for v in self._values.values() if _is_batch(v)}
        if len(lengths) > 1:
            raise ValueError(f"prompt lists must be of one length, got {sorted(lengths)}")
        self._rows = lengths.pop() if lengths else None
        if streamed and self._rows is not None:
            raise TypeError("a streaming function takes one prompt at a time, got a list")
        rows = call.guard.policy.max_items
        if self._rows is not None and self._rows > rows:
            raise ValueError(f"a call may have at most {rows} prompts (max_items), got {self._rows}")
        self.asks = [self._ask(row) for row in range(1 if self._rows is None else self._rows)]

    def _is_plain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether this is one text in the one place for it; then the arguments go through as they came."""
        place, name = self._call.position, self._call.names[0]
        if place is None:
            return False
        value = args[place] if len(args) > place else kwargs.get(name)
        if not isinstance(value, str):
            return False
        self.asks = [calls.Ask({name: value})]
        return True

    def _arguments(self) -> dict[str, Any]:
        """Prompt arguments of this call by name, defaults and `**kwargs` included."""
        self._bound.apply_defaults()
        loose: Mapping[str, Any] = {}
        named = dict(self._bound.arguments)
        prompts = False
        for p in self._call.signature.parameters.values():
            if p.kind is p.VAR_KEYWORD:
                loose = named.pop(p.name, {})
                prompts = _says_prompt(p.name)
        twice = loose.keys() & named.keys()  # possible where an argument is positional only
        if twice:
            raise TypeError(f"{_name(self._call.func)} got {', '.join(sorted(twice))} twice")
        found = {n: {**loose, **named}.get(n) for n in self._call.names}
        found.update({n: v for n, v in loose.items() if _says_prompt(n) or (prompts and isinstance(v, str))})
        return {n: kept(v) for n, v in found.items() if v is not None}

    def _ask(self, row: int) -> calls.Ask:
        texts: dict[str, str] = {}
        for name, value in self._values.items():
            value = value[row] if _is_batch(value) else value
            if is_chat(value):
                history = self._call.guard.policy.history
                texts.update({f"{name}[{i}]": text for i, text in judged_turns(value, history)})
                texts.update({f"{name}[{i}].{key}": words for i, key, words in other_words(value, history)})
            else:
                texts[name] = value  # what is no text is refused by the flow
        return calls.Ask(texts)

    def call(self, texts: calls.Texts) -> Any:
        """Run the function for one ask."""
        return self._invoke([texts])

    def first(self, texts: Sequence[calls.Texts | None]) -> Any:
        if self._rows is None:
            return self._one(texts[0] or {})
        live = [i for i, t in enumerate(texts) if t is not None]
        return self._many([t for t in texts if t is not None], live, len(texts))

    def again(self, ask: int, place: int, texts: calls.Texts) -> Any:
        return self._single(texts, [ask])

    def _one(self, texts: calls.Texts) -> Any:
        result = self._invoke([texts])
        if self.on_loop:
            return _then(result, lambda value: [[value]])
        return [[result]]

    def _many(self, texts: Sequence[calls.Texts], live: list[int], total: int) -> Any:
        result = self._invoke(texts, live)

        def place(values: Any) -> list[list[Any]]:
            if not isinstance(values, list | tuple) or len(values) != len(live):
                got = f"{len(values)} results" if isinstance(values, list | tuple) else type(values).__name__
                raise TypeError(
                    f"a function called with {len(live)} prompts must give a list as long, got {got}"
                )
            made: list[list[Any]] = [[] for _ in range(total)]
            for i, value in zip(live, values, strict=True):
                made[i] = [value]
            return made

        return _then(result, place) if self.on_loop else place(result)

    def _single(self, texts: calls.Texts, rows: list[int]) -> Any:
        result = self._invoke([texts], rows)
        if self._rows is None:
            return result
        return _then(result, lambda values: values[0]) if self.on_loop else result[0]

    def _invoke(self, texts: Sequence[calls.Texts], rows: list[int] | None = None) -> Any:
        """Call the function with these texts.

        Other lists as long as the batch are narrowed to the same rows.
        """
        if self._plain is not None:
            (args, kwargs), place, name = self._plain, self._call.position or 0, self._call.names[0]
            if len(args) > place:
                return self._call.func(*args[:place], texts[0][name], *args[place + 1 :], **kwargs)
            return self._call.func(*args, **{**kwargs, name: texts[0][name]})
        bound = inspect.BoundArguments(self._call.signature, dict(self._bound.arguments))
        for p in self._call.signature.parameters.values():
            value = bound.arguments.get(p.name)
            if p.kind is p.VAR_KEYWORD and value:
                bound.arguments[p.name] = {n: self._narrow(n, v, texts, rows) for n, v in value.items()}
            elif p.name in bound.arguments and p.kind is not p.VAR_POSITIONAL:
                bound.arguments[p.name] = self._narrow(p.name, value, texts, rows)
        return self._call.func(*bound.args, **bound.kwargs)

    def _narrow(self, name: str, value: Any, texts: Sequence[calls.Texts], rows: list[int] | None) -> Any:
        if name not in self._values:
            if rows is not None and _is_batch(value) and len(value) == self._rows:
                return [value[i] for i in rows]
            return value
        value = self._values[name]  # as it was judged: the caller's own may have changed since
        if not _is_batch(value):
            return _put(name, value, texts[0])
        chosen = range(len(texts)) if rows is None else rows
        return [_put(name, value[i], t) for i, t in zip(chosen, texts, strict=True)]

    def pieces(self, outputs: Sequence[Any], policy: Policy) -> list[Piece]:
        return [self._piece(output, policy) for output in outputs]

    def _piece(self, output: Any, policy: Policy) -> Piece:
        """One result as the checks see it; one that cannot be read does not harm its neighbours."""
        read = self._call.output
        try:
            value = output if read is None else read(output)
        except Exception as exc:
            log.error("output cannot be read: error=%s", type(exc).__name__)
            return Piece("output", (), 0, f"output cannot be read ({type(exc).__name__})")
        return text_piece("output", value, policy) if self.modality == "text" else image_piece(value)

    def placeholder(self, output: Any) -> Any:
        policy = self._call.guard.policy
        if self.modality == "text":
            return policy.placeholder_text
        from safeguard.adapters.pictures import placeholder

        return placeholder(output, policy.placeholder_image)

    def redact(self, output: Any, spans: Sequence[Span]) -> Any:
        if not isinstance(output, str):  # a response object: the cut text cannot be put back into it
            return self.placeholder(output)
        return calls.cut_spans(output, spans, self._call.guard.policy.placeholder_text or "[redacted]")

    def assemble(self, outcome: calls.Outcome) -> Any:
        values = [row[0] for row in outcome.outputs]
        return values[0] if self._rows is None else values


def _is_batch(value: Any) -> bool:
    return isinstance(value, list | tuple) and not is_chat(value)


def _put(name: str, value: Any, texts: calls.Texts) -> Any:
    """An argument with its texts as the flow left them; chat messages are copied, never changed in place."""
    if not is_chat(value):
        return texts.get(name, value)
    for i, key, words in other_words(value, "all"):
        if texts.get(place := f"{name}[{i}].{key}", words) != words:
            raise CheckFailed("safeguard", f"cannot put a new text in the place of {place}")
    return [
        {**turn, "content": texts[f"{name}[{i}]"]} if f"{name}[{i}]" in texts else turn
        for i, turn in enumerate(value)
    ]


async def _then(awaitable: Any, change: Callable[[Any], Any]) -> Any:
    return change(await awaitable)
