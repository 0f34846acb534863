"""Reads what a language model answered when asked for one rewritten prompt: pure functions on text.

A chat model wraps its answer in labels, quotes and remarks, runs on, repeats itself or refuses. `read` puts
the functions in order and says why an answer is of no use; iterative prompt refinement asks for
each of these guards.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Why = Literal["", "keep", "empty", "refusal", "loop", "unchanged", "long"]

_QUOTES = {'"': '"', "“": "”", "„": "“", "«": "»", "'": "'", "‘": "’", "`": "`"}
_NOUN = (
    r"(?:text[- ]to[- ]image |image )?"
    r"(?:prompts?|versions?|rewrites?|rewrit(?:ing|ten)|revisions?|descriptions?|output)"
)
_KIND = (
    r"(?:final|refined|rewritten|revised|safer?|new|improved|updated|modified|clean(?:er|ed)?|alternative"
    r"|appropriate|edited)"
)
_LABEL = re.compile(
    rf"(?:{_KIND}[ ,]+){{0,3}}{_NOUN}(?: of (?:the|your) (?:original )?prompt)?\s*[:：]\s*"
    rf"|{_KIND}\s*[:：]\s*",
    re.I,
)
_PREAMBLE = re.compile(
    r"(?:(?:sure|certainly|of course|okay|ok|absolutely|no problem)(?: thing)?[,.!;][^\n:：]{0,120}"
    r"|here(?:'s| is| are| you go)\b[^\n:：]{0,120}"
    r"|(?:the|my|your)\b[^\n:：]{0,60}\b(?:prompt|rewrite|revision)\b[^\n:：]{0,40}"
    r"|i(?: have|'ve| would| will|'d|'ll)?\b[^\n:：]{0,60}"
    r"\b(?:rewr\w+|revis\w+|refin\w+|suggest\w*)\b[^\n:：]{0,60})[:：]\s*",
    re.I,
)
_INTERJECTION = re.compile(r"(?:sure|certainly|of course|okay|absolutely)\s*[!.]\s+", re.I)
_REFUSAL = re.compile(
    r"(?:well,? |sure,? but |unfortunately,? |however,? |no,? )*(?:"
    r"(?:i'?m|i am)(?: very| so| truly| really| just)*"
    r" (?:sorry|afraid|unable|not able|not comfortable|not allowed|not programmed)"
    r"|sorry,? (?:but|i|we|this|that)\b|apologies\b|(?:i|we|my) (?:sincerely )?apologi[sz]|my apologies"
    r"|(?:i|we) (?:simply )?(?:can'?t|cannot|can not|won'?t|will not|couldn'?t|could not|must decline"
    r"|must refuse|have to decline|do not feel|don'?t feel|refuse|decline|am unable|would rather not)\b"
    r"|as an? (?:\w+ )?(?:ai|a\.i\.|artificial intelligence|language model|assistant|chatbot)\b"
    r"|(?:this|that|the|your) (?:\w+ )?(?:prompt|request|content|image)(?: \w+)?"
    r" (?:violates|cannot|can'?t|is not appropriate|is inappropriate|is unsafe|is harmful|is not allowed"
    r"|contains)\b"
    r"|it(?:'s| is) (?:not (?:appropriate|possible|acceptable|ethical)|inappropriate"
    r"|important to (?:note|remember))\b)",
    re.I,
)
_STUTTER = re.compile(r"(\S{1,4}?)\1{19,}")
_SPACES = re.compile(r"[^\S\n]+")
_LOOP_WORDS = 12
"""Longest run of words looked for as the piece that repeats."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What an answer comes to: a rewrite, or why there is none. text is empty unless why is ""."""

    text: str
    why: Why = ""


def read(answer: str, prompt: str, *, keep: str = "keep", stop: Sequence[str] = ()) -> Reading:
    """The rewritten prompt in a model's answer to `prompt`.

    why is "keep" where the answer is the keep word (exact after strip and lower, quotes and a final full stop
    aside), else "empty", "refusal", "loop" or "unchanged" where the answer cannot be used.
    """
    text = cut_at(answer, stop).strip()
    if text.lower() == keep or strip_quotes(text).rstrip(".!").lower() == keep:
        return Reading("", "keep")
    if is_refusal(text):
        return Reading("", "refusal")
    text = strip_quotes(strip_labels(text))
    text = first_lines(text, 1 + prompt.strip().count("\n"))
    text = strip_quotes(strip_labels(strip_quotes(text)))
    if text.rstrip(".!").lower() == keep:
        return Reading("", "keep")
    if not any(c.isalnum() for c in text):
        return Reading("", "empty")
    if is_refusal(text):
        return Reading("", "refusal")
    if is_loop(text):
        return Reading("", "loop")
    if _words(text) == _words(prompt):  # an echo with another capital or full stop is one too
        return Reading("", "unchanged")
    return Reading(text)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def cut_at(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop strings; one that opens the text is skipped, not obeyed."""
    for word in stop:
        text = text.removeprefix(word)
    places = [place for place in (text.find(word) for word in stop if word) if place >= 0]
    return text[: min(places)] if places else text


def strip_labels(text: str) -> str:
    """The text without what stands before the prompt proper: "Sure, here is ...:", "New prompt:", "1."."""
    text = text.strip()
    for _ in range(4):  # a remark, a label, a list sign and a heading sign: more were never seen
        before = text
        text = re.sub(r"^(?:#{1,6}|[-*•>]|\d{1,2}[.)])\s+", "", text)
        text = re.sub(r"^\*\*([^*\n]{1,80}?)[:：]?\*\*[:：]?", r"\1:", text) if _bold_label(text) else text
        for pattern in (_INTERJECTION, _PREAMBLE, _LABEL):
            if found := pattern.match(text.replace("’", "'")):
                text = text[found.end() :].strip()
        if text == before:
            break
    return text


def _bold_label(text: str) -> bool:
    found = re.match(r"\*\*([^*\n]{1,80}?)[:：]?\*\*[:：]?", text)
    return bool(found and _LABEL.fullmatch(found.group(1).strip() + ":"))


def strip_quotes(text: str) -> str:
    """The text without quotation, bold or code marks around the whole of it, or a lone opening quote.

    Marks inside stay: `"stop" and "go"` is not one quotation.
    """
    text = text.strip()
    for _ in range(3):  # marks around marks
        for mark in ("```", "**", "__"):
            if len(text) > 2 * len(mark) and text.startswith(mark) and text.endswith(mark):
                inner = text[len(mark) : -len(mark)]
                text = inner.strip() if mark not in inner else text
        close = _QUOTES.get(text[:1])
        if close is None:
            break
        inner = text[1:-1]
        if len(text) > 1 and text.endswith(close) and text[0] not in inner and close not in inner:
            text = inner.strip()
        elif text[0] in '"“«' and text.count(text[0]) == 1 and close not in text[1:]:
            text = text[1:].strip()  # a quotation that was cut off before its end
        else:
            break
    return text


def first_lines(text: str, count: int) -> str:
    """The first `count` lines of the first paragraph, joined as they were, runs of blanks made one."""
    paragraph = re.split(r"\n\s*\n", text.strip(), maxsplit=1)[0] if count == 1 else text.strip()
    lines = [_SPACES.sub(" ", line).strip() for line in paragraph.splitlines()[:count]]
    return "\n".join(lines).strip()


def is_refusal(text: str) -> bool:
    """Whether the text opens as an assistant that declines; a picture of a sign that says so does not."""
    opening = strip_quotes(text[:400]).replace("’", "'")
    return _REFUSAL.match(opening) is not None


def is_loop(text: str) -> bool:
    """Whether 1 to 12 words come at least four times in a row (eight words or more), or a word stutters."""
    if _STUTTER.search(text):
        return True
    words = _words(text)
    for period in range(1, _LOOP_WORDS + 1):
        needed = max(3 * period, 8 - period)  # agreements of a word with the one a period before it
        run = 0
        for here, before in zip(words[period:], words, strict=False):
            run = run + 1 if here == before else 0
            if run >= needed:
                return True
    return False


def end_at_word(text: str) -> str:
    """A text that was cut off, without its last, perhaps broken, word and the punctuation before that."""
    text = text.rstrip()
    head, blank, _ = text.rpartition(" ")
    return head.rstrip(" ,;:-–—(") if blank else text
