"""Chunk objects of chat streams: which texts are in one.

A chunk is an object or a mapping with `choices`, each with a `delta` (chat) or a `text` (completions), as
OpenAI's API and those that copy it stream them. Each choice is a text of its own, so are its refusal, its
reasoning and each call of a tool. Whatever else says more than one word is judged as it stands. What is not
known to be read here, or to be harmless, is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

WORDS = ("content", "refusal", "reasoning_content", "reasoning")
"""Parts of a delta that are text for a reader."""
_SILENT = frozenset({"role", "index", "id", "type", "name", "tool_call_id"})
"""Parts of a delta that are names and numbers of the protocol."""
_READ = (*WORDS, "tool_calls", "function_call", "function", "arguments")
"""Parts that are read even where they are properties of an object."""
_LONGEST_NAME = 200  # characters; a role or an id that is longer is a text in disguise
_DEEPEST = 8  # lists and mappings in one another
_PLAIN_NAME = re.compile(r"\w{1,40}", re.ASCII)

Key = tuple[int, str]
"""Choice and part of it: one text of a stream."""


class Unreadable(Exception):
    """A chunk in which there may be something that no check can read; says what."""


@dataclass(slots=True)
class Texts:
    """What one chunk adds to the texts of its stream, and the choices that end with it.

    beside: texts of more than one word that stand where names and numbers do, each a whole.
    """

    added: list[tuple[Key, str]] = field(default_factory=list, repr=False)
    beside: list[tuple[Key, str]] = field(default_factory=list, repr=False)
    ended: list[int] = field(default_factory=list)


def read_chunk(chunk: Any) -> Texts:
    """The texts in one chunk object. Raises Unreadable for anything that is not known to be harmless."""
    choices = get(chunk, "choices")
    if not isinstance(choices, list | tuple):
        raise Unreadable(f"a stream must give text, got {type(chunk).__name__}, or chunks with choices")
    texts = Texts(beside=list(_beside(chunk, 0, ("choices",))))
    for place, choice in enumerate(choices):
        given = get(choice, "index")
        index = place if given is None else given
        if not isinstance(index, int):
            raise Unreadable(f"the index of a choice must be a number, got {type(index).__name__}")
        delta, text = get(choice, "delta"), get(choice, "text")
        texts.beside += _beside(choice, index, ("delta", "text"))
        if get(choice, "message") is not None:
            raise Unreadable("a chunk with a whole message is no part of a stream")
        if text is not None:
            texts.added.append(((index, "content"), _text(text, "text")))
        if delta is not None:
            texts.added += [((index, part), words) for part, words in _read_delta(delta)]
            texts.beside += _beside_delta(delta, index)
        if get(choice, "finish_reason") is not None:
            texts.ended.append(index)
    return texts


def _beside(value: Any, index: int, read: Sequence[str]) -> Iterator[tuple[Key, str]]:
    """Texts of more than one word in the parts of a value that are not read elsewhere."""
    for name, part in parts_of(value).items():
        if name in read:
            continue
        for words in _strings(part, name):
            if len(words) > _LONGEST_NAME:
                raise Unreadable(f"a chunk's {named(name)} cannot be seen by any check")
            if len(words.split(None, 1)) > 1:
                yield (index, named(name)), words


def _beside_delta(delta: Any, index: int) -> Iterator[tuple[Key, str]]:
    if isinstance(delta, str):
        return
    yield from _beside(delta, index, (*WORDS, "tool_calls", "function_call"))
    for call in get(delta, "tool_calls") or ():
        yield from _beside(call, index, ("function",))


def _strings(value: Any, name: str, depth: int = 0) -> Iterator[str]:
    """All texts in a value, however nested, the keys of mappings too."""
    if isinstance(value, str):
        yield value
    elif value is None or isinstance(value, bool | int | float):
        return
    elif depth == _DEEPEST or (isinstance(value, bytes | bytearray) and len(value) > _LONGEST_NAME):
        raise Unreadable(f"a chunk's {named(name)} cannot be seen by any check")
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _strings(part, name, depth + 1)
    elif isinstance(value, Mapping) or hasattr(value, "__dict__"):
        for key, part in parts_of(value).items():
            yield from _strings(key, name, depth + 1)
            yield from _strings(part, name, depth + 1)


def named(name: Any) -> str:
    """A name as errors and reports may say it: a key can be anything, also a text."""
    return name if isinstance(name, str) and _PLAIN_NAME.fullmatch(name) else "part"


def _read_delta(delta: Any) -> list[tuple[str, str]]:
    """(part, text) of all texts in a delta, in order."""
    if isinstance(delta, str):
        return [("content", delta)]
    found: list[tuple[str, str]] = []
    for name, value in parts_of(delta).items():
        if value is None or value in ("", [], {}):
            continue
        if name in WORDS:
            found.append((name, _content(value, name)))
        elif name == "tool_calls":
            if not isinstance(value, list | tuple):
                raise Unreadable(f"tool_calls of a chunk must be a list, got {type(value).__name__}")
            for place, call in enumerate(value):
                found += _read_call(f"tool_calls[{_number(call, place)}]", call)
        elif name == "function_call":
            found += _read_function(name, value)
        elif not (name in _SILENT and _is_name(value)):
            raise Unreadable(f"a chunk's {named(name)} cannot be seen by any check")
    return found


def _read_call(name: str, call: Any) -> list[tuple[str, str]]:
    parts = {n: v for n, v in parts_of(call).items() if v is not None}
    function = parts.pop("function", None)
    for other, value in parts.items():
        if other not in _SILENT or not _is_name(value):
            raise Unreadable(f"the {named(other)} of a tool call cannot be seen by any check")
    return [] if function is None else _read_function(name, function)


def _read_function(name: str, function: Any) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for part, value in parts_of(function).items():
        if value is None or value == "":
            continue
        if part not in ("name", "arguments"):
            raise Unreadable(f"the {named(part)} of a tool call cannot be seen by any check")
        found.append((f"{name}.{part}", _text(value, part)))
    return found


def _content(value: Any, name: str) -> str:
    """Text of a content, which may come in parts (`[{"type": "text", "text": ...}]`)."""
    if not isinstance(value, list | tuple):
        return _text(value, name)
    texts = []
    for part in value:
        if isinstance(part, str):
            texts.append(part)
            continue
        parts = {n: v for n, v in parts_of(part).items() if v is not None}
        if set(parts) - {"type", "text", "index"} or parts.get("type", "text") != "text":
            raise Unreadable(f"a part of a chunk's {name} cannot be seen by any check")
        texts.append(_text(parts.get("text", ""), name))
    return "".join(texts)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise Unreadable(f"a chunk's {name} must be text, got {type(value).__name__}")
    return value


def _is_name(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, str) and len(value) <= _LONGEST_NAME)


def _number(call: Any, place: int) -> int:
    given = get(call, "index")
    return given if isinstance(given, int) else place


def get(value: Any, name: str) -> Any:
    """A part of an object or a mapping, None where it has none."""
    if isinstance(value, Mapping):
        return value.get(name)
    return None if isinstance(value, str | bytes) else getattr(value, name, None)


def parts_of(value: Any) -> Mapping[str, Any]:
    """Names and values of an object: a mapping, a pydantic model with what it has beyond its fields, ...

    Raises Unreadable where an object does not tell what it holds.
    """
    if isinstance(value, Mapping):
        return value
    extra = getattr(value, "model_extra", None)
    try:
        own = {n: v for n, v in vars(value).items() if not n.startswith("_")}
    except TypeError:  # slots, numbers, bytes
        slots = [n for kind in type(value).__mro__ for n in getattr(kind, "__slots__", ())]
        if not slots:
            raise Unreadable(f"a {type(value).__name__} in a chunk cannot be seen by any check") from None
        own = {n: getattr(value, n, None) for n in slots if not n.startswith("_")}
    own.update({n: v for n in _READ if n not in own and (v := getattr(value, n, None)) is not None})
    return {**own, **extra} if isinstance(extra, Mapping) else own


_HIGH = re.compile("[dD][89abAB]..")
_SURROGATE = re.compile("[dD][89a-fA-F]..")


class JsonText:
    """Undoes the escapes of JSON in a text that comes in pieces; an escape may be split anywhere."""

    _ESCAPE = re.compile(
        r'\\(?:u([dD][89abAB][0-9a-fA-F]{2})\\u([dD][c-fC-F][0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|(["\\/bfnrt]))'
    )
    _UNFINISHED = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?\Z")
    _SECOND_HALF = re.compile(r"(?:\\(?:u[0-9a-fA-F]{0,3})?)?")  # of a pair, as far as it has come
    _PLAIN = {"b": " ", "f": " ", "n": "\n", "r": "\n", "t": "\t"}  # noqa: RUF012  # never changed

    def __init__(self) -> None:
        self._tail = ""

    def __call__(self, text: str) -> str:
        """What the text reads as, as far as its last escape is complete."""
        text = self._tail + text
        cut = self._unfinished(text)
        self._tail = text[cut:]
        # pairs are taken from the left: an escaped backslash does not begin another escape
        return self._ESCAPE.sub(self._read, text[:cut])

    def _unfinished(self, text: str) -> int:
        """Where an escape begins that the next piece may complete."""
        done = 0
        for match in self._ESCAPE.finditer(text):
            if _HIGH.fullmatch(match[3] or "") and self._SECOND_HALF.fullmatch(text, match.end()):
                return match.start()
            done = match.end()
        cut = self._UNFINISHED.search(text, done)
        return len(text) if cut is None else cut.start()

    def end(self) -> str:
        """What is left of an escape that never ended."""
        tail, self._tail = self._tail, ""
        return tail

    def _read(self, match: re.Match[str]) -> str:
        high, low, code, sign = match.groups()
        if high is not None:
            return chr(0x10000 + ((int(high, 16) & 0x3FF) << 10) + (int(low, 16) & 0x3FF))
        if code is None:
            return self._PLAIN.get(sign, sign)
        return "\ufffd" if _SURROGATE.fullmatch(code) else chr(int(code, 16))


def texts_of(read: Callable[[Any], Any]) -> Callable[[Any], Texts]:
    """A reader of chunks from a function that gives the text of one."""

    def reader(chunk: Any) -> Texts:
        try:
            text = read(chunk)
        except Exception as exc:
            raise Unreadable(f"output cannot be read ({type(exc).__name__})") from exc
        if text is None:
            return Texts()
        if not isinstance(text, str):
            raise Unreadable(f"a stream must give text, got {type(text).__name__}")
        return Texts([((0, "content"), text)])

    return reader
