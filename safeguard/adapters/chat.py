"""Where the turns of a conversation are in the text that a chat template made of it.

The template itself is asked: it renders messages with known words in them, and what it writes around those
words are its markers. So any template works, and one that cannot be understood only means that the whole text
is judged.
"""

from __future__ import annotations

import logging
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from safeguard.adapters.messages import judged_turns, other_words, text_of, words_of

log = logging.getLogger(__name__)

Render = Callable[[list[dict[str, str]], bool], str]
"""Messages, and whether to add the generation prompt -> the text as the tokenizer reads it back."""

Stretch = tuple[int, int, bool]
"""Start and end of something said, and whether it is the user's."""

_TOKEN = re.compile(r"<[^<>\n]{1,40}>|\[[^\[\]\n]{1,20}\]")
_SYSTEM, _FIRST, _ANSWER, _SECOND = "Zqsystemqz", "Zqfirstqz", "Zqanswerqz", "Zqsecondqz"


@dataclass(frozen=True, slots=True)
class Part:
    """Characters start to end of a rendered prompt that are judged under one name; -1 where not found."""

    name: str
    start: int
    end: int
    text: Any = field(repr=False)


@dataclass(frozen=True, slots=True)
class Markers:
    """What a template writes before and after what is said; `closing` is what it writes after the last.

    `system` is None where the template has no place for a system turn.
    """

    user_open: str
    user_end: str
    answer_open: str
    answer_end: str
    closing: str
    system: tuple[str, str] | None

    @property
    def openings(self) -> tuple[str, str]:
        """What announces a turn of the user and of the model."""
        return self.user_open, self.answer_open


def learn(render: Render) -> Markers | None:
    """The markers of a template; None where it cannot be told apart who speaks."""
    user, answer = {"role": "user", "content": _FIRST}, {"role": "assistant", "content": _ANSWER}
    try:
        text = render([user, answer, {"role": "user", "content": _SECOND}], True)
        alone = render([user], False)
        asked = render([user], True)
    except Exception as exc:  # a template may raise what it likes
        log.info("chat template cannot be read, so prompts are judged whole: error=%s", type(exc).__name__)
        return None
    cut = re.fullmatch(f"(.*?){_FIRST}(.*?){_ANSWER}(.*?){_SECOND}(.*)", text, re.DOTALL)
    if cut is None:
        return None
    before, to_answer, to_user, _ = cut.groups()
    generation = asked[len(alone) :] if asked.startswith(alone) else ""
    user_open = _common_end(before, to_user)
    answer_open = _longest_end_in(to_answer, generation) or to_answer
    user_end = to_answer.removesuffix(answer_open)
    if user_end.strip() and len(user_open.removeprefix(user_end).strip()) >= 3:
        user_open = user_open.removeprefix(user_end)  # the end of a default system turn is not part of it
    if len(user_open.strip()) < 3 or len(answer_open.strip()) < 3 or user_open == answer_open:
        return None
    return Markers(
        user_open,
        user_end,
        answer_open,
        to_user.removesuffix(user_open),
        asked.rpartition(_FIRST)[2],
        _system_markers(render, user, answer_open),
    )


def _system_markers(render: Render, user: dict[str, str], answer_open: str) -> tuple[str, str] | None:
    try:
        text = render([{"role": "system", "content": _SYSTEM}, user], False)
    except Exception as exc:  # some templates refuse a system turn
        log.debug("chat template has no system turn: error=%s", type(exc).__name__)
        return None
    cut = re.match(f"(.*?){_SYSTEM}(.*?){_FIRST}", text, re.DOTALL)
    if cut is None or not cut[1].strip() or not cut[2].strip():
        return None
    if answer_open.strip() in cut[1]:  # written as if the model had said it
        return None
    return cut[1], cut[2]


def _common_end(a: str, b: str) -> str:
    """What both texts end with, from the beginning of a token such as `</s>`, `<|user|>` or `[INST]` on."""
    size = 0
    while size < min(len(a), len(b)) and a[-1 - size] == b[-1 - size]:
        size += 1
    for text in (a, b):
        cut = (m for m in _TOKEN.finditer(text) if m.start() < len(text) - size < m.end())
        size = min([size, *(len(text) - m.end() for m in cut)])
    return a[len(a) - size :]


def _longest_end_in(text: str, whole: str) -> str:
    """The longest end of `text` that is inside `whole`, which may go on, as with `<think>`."""
    return next((text[i:] for i in range(len(text)) if len(text[i:].strip()) >= 3 and text[i:] in whole), "")


def parts_of(
    text: str, markers: Markers | None, history: Literal["new", "all"], plain: Callable[[str], str]
) -> list[Part]:
    """What is judged of a rendered prompt, the last user turn first, under the name "prompt".

    new: the turns after the last answer that was followed by another turn, without the system turn at the
    very beginning. all: every word of the text. plain takes the control tokens out of a text. A text without
    any turns is one part. Who speaks is told by the text alone: one that spells control tokens can pretend,
    see `history: all`.
    """
    if markers is None or markers.user_open not in text:
        return _named(text, [(0, len(text), False)], plain)
    end = len(text)
    for ending in (markers.closing, markers.answer_open):
        if ending.strip() and text.endswith(ending):
            end -= len(ending)
            break
    start = 0
    if history == "new":
        start = _start_of_new(text, end, markers, plain) or _end_of_system(text, markers)
    return _named(text, _turns(text, start, end, markers), plain)


def _start_of_new(text: str, end: int, markers: Markers, plain: Callable[[str], str]) -> int:
    """Where the last answered turn ends. An answer after which nothing is said counts as new."""
    ends: list[int] = []
    last = max(text.rfind(opening) for opening in markers.openings)
    ending = markers.answer_end if markers.answer_end.strip() else markers.user_open
    at = text.find(markers.answer_open)
    while at >= 0:
        found = text.find(ending, at + len(markers.answer_open))
        if found < 0:
            break
        after = found if ending == markers.user_open else found + len(ending)
        if after > last:
            break
        ends.append(after)
        at = text.find(markers.answer_open, after)
    # what is said after one of them is said after all before it, so few need to be looked at
    known = bisect_left(ends, True, key=lambda a: not _named(text, _turns(text, a, end, markers), plain))
    return ends[known - 1] if known else 0


def _end_of_system(text: str, markers: Markers) -> int:
    """Where a system turn at the very beginning ends, 0 where there is none."""
    if markers.system is None:
        return 0
    opening, ending = markers.system
    at = text.find(opening)
    if at < 0 or at > len(opening):  # a repeated beginning-of-text token is all that may stand before
        return 0
    end = text.find(ending, at + len(opening))
    if end < 0 or (markers.answer_open in text[:end]):
        return 0
    # the marker that ends it may be the one that begins the user's turn, which must be seen
    return end + len(ending) - (len(markers.user_open) if ending.endswith(markers.user_open) else 0)


def _turns(text: str, start: int, end: int, markers: Markers) -> Iterator[Stretch]:
    """Each stretch between two markers, without what the template ends a turn with."""
    opening = re.compile("|".join(re.escape(o) for o in sorted(markers.openings, key=len, reverse=True)))
    at, users = start, False
    for match in opening.finditer(text, start, end):
        yield at, _without_end(text, at, match.start(), markers), users
        at, users = match.end(), match[0] == markers.user_open
    yield at, _without_end(text, at, end, markers), users


def _without_end(text: str, start: int, end: int, markers: Markers) -> int:
    for ending in (markers.user_end, markers.answer_end):
        if ending.strip() and text.endswith(ending, start, end):
            return end - len(ending)
    return end


def _named(text: str, stretches: Iterable[Stretch], plain: Callable[[str], str]) -> list[Part]:
    """Stretches that say something, trimmed; the last one of the user is the prompt."""
    found: list[tuple[int, int, bool, str]] = []
    for start, end, users in stretches:
        said = plain(text[start:end]).strip()
        if not said:
            continue
        # keep to what is said, so that markers around it stay when it is rewritten
        at = text.find(said, start, end)
        place = (at, at + len(said)) if at >= 0 else (start, end)
        found.append((*place, users, said))
    if not found:
        return []
    main = max((i for i, f in enumerate(found) if f[2]), default=len(found) - 1)
    rest = [Part(f"prompt[{i}]", f[0], f[1], f[3]) for i, f in enumerate(found) if i != main]
    return [Part("prompt", found[main][0], found[main][1], found[main][3]), *rest]


def parts_of_messages(
    messages: Sequence[Mapping[str, Any]],
    text: str,
    history: Literal["new", "all"],
    control: Callable[[str], bool],
) -> list[Part]:
    """What is judged of structured messages, and where it is in `text`, which the template made of them.

    control tells whether a text spells something with which the template marks turns. Where any turn of the
    user does, an answer may be forged, so the whole conversation is judged.
    """
    forged = any(control(word) for m in messages for word in words_of(m))
    turns = [
        (i, said)
        for i, said in judged_turns(messages, "all" if forged else history)
        if said not in ("", None)
    ]
    users = [i for i, _ in turns if str(messages[i]["role"]).strip().lower() == "user"]
    main = users[-1] if users else turns[-1][0] if turns else None
    places = _places([text_of(m["content"]) for m in messages], text)
    parts = [Part("prompt" if i == main else f"prompt[{i}]", *places[i], said) for i, said in turns]
    for i, key, words in other_words(messages, "all" if forged else history):  # a template may write them
        parts.append(Part(f"prompt[{i}].{key}", -1, -1, words))
    return sorted(parts, key=lambda p: p.name != "prompt")


def _places(said: Sequence[Any], text: str) -> list[tuple[int, int]]:
    """Where each message stands in the rendered text, one after the other; (-1, -1) where it is not found."""
    places: list[tuple[int, int]] = []
    cursor = 0
    for content in said:
        at = text.find(content, cursor) if isinstance(content, str) and content else -1
        places.append((at, at + len(content)) if at >= 0 else (-1, -1))
        cursor = max(cursor, places[-1][1])
    return places
