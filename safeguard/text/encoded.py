"""Text hidden in codes that a language model reads fluently: base64, hex, URL escapes, entities, Morse ...

Each function gives the edits that put what is said in place of its code. All are linear in the length of the
text, and what stands there afterwards is never longer than the code.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterator
from html import unescape

from safeguard.text.ciphers import ROT13
from safeguard.text.view import Edit
from safeguard.text.words import ranks


def _class(char: str) -> str:
    if char.isalpha():
        return "A" if char.isupper() else "a"
    return "1" if char.isdigit() else char if char in "%&\\=-." else " "


_CLASSES = bytes(ord(_class(c)) for c in map(chr, range(128))) + b" " * 128
_SIGNS = (b"aA", b"a1", b"A1", b"1a", b"1A", b"%", b"&", b"\\", b"=A", b"=1", b"- .", b". -", b"- -", b". .")
_NUMBERS = (b"1" * 8, b"11 11 11", b"11 111", b"111 11")
_CAPITALS = b"A" * 12
_CALLS = re.compile(r"[A-Za-z]\(\d{2,3}\)[ \t]?[+.&,]?[ \t]?[A-Za-z]{2,12}\(\d")
_LETTER = r"[^\W\d_]"
_MARK = r"\"[ ]?\+[ ]?\"|'[ ]?\+[ ]?'|\*\*|<!--[^<>]{0,40}-->|</?[a-zA-Z]{1,8}>"
_SPLIT = re.compile(f"(?<={_LETTER})(?:{_MARK})++(?={_LETTER})")


def may_be_encoded(text: str) -> bool:
    """Whether any function here may find something. True too often, never too rarely; takes microseconds."""
    data = text.encode("ascii", "replace").translate(_CLASSES, b",;:")
    if any(sign in data for sign in _SIGNS) or _CALLS.search(text) or _SPLIT.search(text):
        return True
    if b"11" in data and any(sign in data for sign in _NUMBERS):
        return True
    return _CAPITALS in data or (not text.isascii() and _BRAILLE.search(text) is not None)


_LEAST_PRINTABLE = 0.9  # of the bytes and of the characters; the rest may be noise put there to spoil it
_LEAST_LETTERS = 0.6
_SHORT = 8  # characters; chance makes so few of them readable, so there must be a word
_WORD = re.compile(r"[^\W\d_]{3,}")


def _message(data: bytes, *, clean: bool = False) -> str | None:
    """The text that bytes spell, None where they spell none. clean: not even one byte may be noise."""
    if max(data[::2].count(0), data[1::2].count(0)) * 2 > len(data) - 4 > 0:  # ASCII in UTF-16
        data = data.removeprefix(b"\xff\xfe").removeprefix(b"\xfe\xff").replace(b"\0", b"")
    text = data.decode("utf-8", "ignore")
    least = 1.0 if clean else _LEAST_PRINTABLE
    if not text or len(text.encode()) < least * len(data):
        return None
    if sum(c.isprintable() or c in "\n\r\t" for c in text) < least * len(text):
        return None
    if len(text) < _SHORT:
        return text if _has_word(text) else None
    letters = sum(c.isalpha() or c == " " for c in text)
    return text if letters >= _LEAST_LETTERS * len(text) or _may_be_code(text) else None


def _may_be_code(text: str) -> bool:
    return len(text) >= 2 * _SHORT and (text.isalnum() or "%" in text or "&#" in text or "\\" in text)


def _has_word(text: str) -> bool:
    return any(word in ranks() for word in _WORD.findall(text.lower()))


_ENTITY = re.compile(r"&(?:#[0-9]{1,40}|#[xX][0-9a-fA-F]{1,40}|[A-Za-z][A-Za-z0-9]{1,31});?")


def read_entities(text: str) -> Iterator[Edit]:
    """Entities of HTML, numbered and named: "&#107;ill", "&amp;"."""
    if "&" not in text:
        return
    for match in _ENTITY.finditer(text):
        new = unescape(match.group())
        if new != match.group():
            yield match.start(), match.end(), new


_PERCENT = re.compile(r"(?:%[0-9a-fA-F]{2})+|(?:%u[0-9a-fA-F]{4})+|(?:=[0-9A-F]{2}){2,}|(?<=\w)\+(?=\w)")


def read_percent(text: str) -> Iterator[Edit]:
    """Escapes of addresses and mails: "%6bill", "%u006b", "=6B=69"; with them "+" is a space."""
    if "%" not in text and "=" not in text:
        return
    plus = re.search("%[0-9a-fA-F]{2}", text) is not None
    for match in _PERCENT.finditer(text):
        code = match.group()
        if code == "+":
            new = " " if plus else code
        elif code[1] == "u":
            new = "".join(chr(int(part, 16)) for part in code.split("%u")[1:])
        else:
            new = bytes.fromhex(code.replace(code[0], "")).decode("utf-8", "replace")
        if "\ufffd" not in new and new != code:
            yield match.start(), match.end(), new


def read_split(text: str) -> Iterator[Edit]:
    """Words that quotes, marks of bold type or empty tags part: "ki" + "ll", k**i**ll, ki<!-- -->ll."""
    for match in _SPLIT.finditer(text):
        yield match.start(), match.end(), ""


_ESCAPE = re.compile(
    r"\\{1,8}(?:x(?P<x>[0-9a-fA-F]{2})|u(?P<u>[0-9a-fA-F]{4})|U(?P<long>000[0-9a-fA-F]{5}|0010[0-9a-fA-F]{4})"
    r"|u\{0{0,4}(?P<braced>10[0-9a-fA-F]{4}|[0-9a-fA-F]{1,5})\}|(?P<octal>1[0-7]{2}|0[4-7][0-7]))"
)


def read_escapes(text: str) -> Iterator[Edit]:
    """Escapes of programming languages: a backslash and x6b, u006b, u{6b}, U0000006b or octal 153."""
    if "\\" not in text:
        return
    for match in _ESCAPE.finditer(text):
        digits = match[match.lastgroup or 0]
        yield match.start(), match.end(), chr(int(digits, 8 if match.lastgroup == "octal" else 16))


_END = r"(?![0-9A-Za-z])"
_PAIR = r"(?:0[xX]|[uU]\+?00)?[0-9a-fA-F]{2}h?"
_CODE = r"(?:3[2-9]|[4-9]\d|1[01]\d|12[0-6])(?![\d.A-Za-z])"
_OCTAL = r"\\?(?:0?1[0-7]{2}|0?0[4-7][0-7])(?![\d.A-Za-z])"
_GAP = r"(?:, ?|\r?\n|[ \t;/|-]|\)[ \t]?[+.&,]?[ \t]?[A-Za-z]{2,12}\()"
_BYTES = re.compile(
    r"(?P<bits>(?<![0-9A-Za-z])[01]{8}(?:(?:\r?\n|[ \t,|]|)[01]{8})++)"
    r"|(?P<sevens>(?<![0-9A-Za-z])[01]{7}(?:(?:\r?\n|[ \t,|])[01]{7}){3,}+(?![0-9A-Za-z]))"
    rf"|(?<![0-9A-Za-z])(?P<hex>(?:0[xX])?[0-9a-fA-F]{{8,}}+){_END}"
    rf"|(?<![0-9A-Za-z])(?P<pairs>{_PAIR}(?:[ \t\r\n,:;|/.-]{{1,2}}{_PAIR}{_END}){{3,}}+)"
    rf"|(?<![0-9A-Za-z.])(?P<codes>{_CODE}(?:{_GAP}{_CODE}){{3,}}+)"
    rf"|(?<![0-9A-Za-z.])(?P<octals>{_OCTAL}(?:{_GAP}{_OCTAL}){{3,}}+)"
)
_NUMBER = re.compile(r"\d+")
_NO_DIGIT = re.compile(r"0[xX]|[uU]\+?00|[^0-9a-fA-F]")


def read_bytes(text: str) -> Iterator[Edit]:
    """Bytes written as numbers: "6b696c6c", "6b 69 6c 6c", "107 105 108 108", "01101011 01101001 ..."."""
    for match in _BYTES.finditer(text):
        code, kind = match.group(), match.lastgroup
        numbers: Iterator[int] | None = None
        if kind == "codes":
            numbers = (int(number) for number in _NUMBER.findall(code))
        elif kind == "octals":
            numbers = (int(number, 8) for number in _NUMBER.findall(code))
        elif kind == "sevens":
            numbers = (int(number, 2) for number in _NUMBER.findall(code))
        elif kind == "bits":
            bits = "".join(c for c in code if c in "01")
            numbers = (int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))
        digits = "" if numbers is not None else _NO_DIGIT.sub("", code)
        data = bytes(numbers) if numbers is not None else bytes.fromhex(digits[: len(digits) // 2 * 2])
        new = _message(data)
        if new is None and kind == "pairs":  # a number may stand before them: "the 12 6b 69 6c 6c"
            new = _message(data[1:])
        if new is None and kind == "hex" and len(digits) >= _LONG:  # half a byte too many at its beginning
            new = _message(bytes.fromhex(digits[1 : len(digits) - (len(digits) - 1) % 2]))
        if new is not None:
            yield match.start(), match.end(), new


_BASE64 = re.compile(  # lines of 40 and more go together with what follows
    r"(?:[A-Za-z0-9+/_-]{40,}+\r?\n(?=[A-Za-z0-9+/_-]{6}))*+[A-Za-z0-9+/_-]{6,}+={0,2}"
)
_PART = re.compile(r"[A-Za-z0-9]{6,}+(?:={1,2}\Z)?")
_TO_STANDARD = str.maketrans("-_", "+/", "=\r\n")
_LONG_BASE32 = 20
_LONG = 24  # characters; from here on a code may begin in the middle of a run


def read_base64(text: str) -> Iterator[Edit]:
    """Base64 and its form for addresses, with or without padding, in lines, or cut off at either end."""
    for match in _BASE64.finditer(text):
        run = match.group()
        letters = run.rstrip("=")
        if letters.islower() or letters.isupper() or letters.isdecimal() or letters[1:].islower():
            continue  # a word, as nearly all are
        new = _message(_bytes_of(run), clean=True)
        whole = run.isalnum() or new is not None
        parts = [] if whole else list(_PART.finditer(run))  # of a path, or of words joined by hyphens
        read = [(p, _message(_bytes_of(p.group()), clean=True)) for p in parts]
        if any(said is not None for _, said in read):
            for part, said in read:
                if said is not None:
                    yield match.start() + part.start(), match.start() + part.end(), said
            continue
        new = new or _from_base64(run.translate(_TO_STANDARD))
        if new is not None:
            yield match.start(), match.end(), new


def _from_base64(letters: str) -> str | None:
    """What a code says that was cut off, spoilt or put in rot13."""
    if len(letters) >= _LONG_BASE32 and letters.isalnum() and letters.isupper():
        return None
    for first in range(4 if len(letters) >= _LONG else 1):
        if (new := _message(_bytes_of(letters[first:]))) is not None:
            return new
    return _message(_bytes_of(letters.translate(ROT13))) if len(letters) >= _LONG // 2 else None


def _bytes_of(code: str) -> bytes:
    letters = code.translate(_TO_STANDARD)
    letters = letters[:-1] if len(letters) % 4 == 1 else letters
    return base64.b64decode(letters + "=" * (-len(letters) % 4))


_GROUP = re.compile(r"[A-Za-z0-9+/_]+={0,2}")
_LEAST_GROUPS = 3
_LEAST_GROUPED = 16  # characters of all groups
_LONGEST_GROUP = 80
_BETWEEN = re.compile(r"[\s,;:|!\"'+.\\-]{1,3}")


def read_groups(text: str) -> Iterator[Edit]:
    """Base64 and hex cut into groups of one length: "aG93 IGRv IGkg", "686f-7720-646f"."""
    run: list[re.Match[str]] = []
    match: re.Match[str] | None
    for match in _GROUP.finditer(text):
        size, whole = len(match.group()), len(run[0].group()) if run else 0
        if size <= whole and _BETWEEN.fullmatch(text, run[-1].end(), match.start()):
            if size == whole:
                run.append(match)
                continue
            if len(run) >= _LEAST_GROUPS - 1:  # a shorter one is the last; behind a word it begins a run
                run.append(match)
                match = None
        yield from _ungrouped(run)
        run = [match] if match is not None and 2 <= size <= _LONGEST_GROUP else []
    yield from _ungrouped(run)


def _ungrouped(run: list[re.Match[str]]) -> Iterator[Edit]:
    code = "".join(match.group() for match in run)
    if len(run) < _LEAST_GROUPS or len(code) < _LEAST_GROUPED:
        return
    if code.isalpha() and (code.islower() or code.isupper()):
        return  # words of one length
    new = None
    if len(code) % 2 == 0 and not set(code).difference("0123456789abcdefABCDEF"):
        new = _message(bytes.fromhex(code), clean=True)
    if new is None:
        new = _message(_bytes_of(code), clean=True)
    if new is not None:
        yield run[0].start(), run[-1].end(), new


_BASE32 = re.compile(r"(?<![A-Za-z0-9])[A-Z2-7]{12,}+={0,6}(?![A-Za-z0-9])")


def read_base32(text: str) -> Iterator[Edit]:
    """Base32: capitals and the digits 2 to 7."""
    for match in _BASE32.finditer(text):
        letters = match.group().rstrip("=")
        letters = letters[: len(letters) - (len(letters) % 8 in (1, 3, 6))]
        try:
            new = _message(base64.b32decode(letters + "=" * (-len(letters) % 8)))
        except binascii.Error:
            continue
        if new is not None:
            yield match.start(), match.end(), new


_MORSE_LETTERS = (
    ".- -... "
    "-.-. -.. . ..-. --. .... .. .--- -.- .-.. -- -. --- .--. --.- .-. ... - ..- ...- .-- -..- -.-- --.. "
    "----- .---- ..--- ...-- ....- ..... -.... --... ---.. ----. .-.-.- --..-- ..--.. .----. -.-.-- -....-"
)
_MORSE = dict(
    zip(re.findall(r"\S+", _MORSE_LETTERS), "abcdefghijklmnopqrstuvwxyz0123456789.,?'!-", strict=True)
)
_MORSE_RUN = re.compile(r"(?<![^\s])[.-]{1,6}(?:(?: ?[/|] ?|[ \t]{1,3}|\r?\n)[.-]{1,6}(?![^\s/|])){2,}+")
_MORSE_PART = re.compile(r"([.-]+)([^.-]*)")


def read_morse(text: str) -> Iterator[Edit]:
    """Morse code of dots and hyphens; words stand apart by "/" or several spaces."""
    for match in _MORSE_RUN.finditer(text):
        letters = []
        for code, gap in _MORSE_PART.findall(match.group()):
            letters.append(_MORSE.get(code, code))
            if len(gap) > 1 or gap in ("/", "|", "\n"):
                letters.append(" ")
        new = "".join(letters)
        if _has_word(new):
            yield match.start(), match.end(), new


_BRAILLE = re.compile("[\u2801-\u283f]")
_BRAILLE_LETTERS = dict(zip("⠁⠃⠉⠙⠑⠋⠛⠓⠊⠚⠅⠇⠍⠝⠕⠏⠟⠗⠎⠞⠥⠧⠺⠭⠽⠵", "abcdefghijklmnopqrstuvwxyz", strict=True))


def read_braille(text: str) -> Iterator[Edit]:
    """Letters of uncontracted English Braille."""
    if text.isascii():
        return
    for match in _BRAILLE.finditer(text):
        if match.group() in _BRAILLE_LETTERS:
            yield match.start(), match.end(), _BRAILLE_LETTERS[match.group()]


READERS: tuple[Callable[[str], Iterator[Edit]], ...] = (
    read_entities,
    read_percent,
    read_escapes,
    read_split,
    read_groups,
    read_bytes,
    read_base32,
    read_base64,
    read_morse,
    read_braille,
)
"""In this order: a code inside another one is often written with the escapes of the outer one."""
