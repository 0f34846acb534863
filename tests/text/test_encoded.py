"""Codes that a model reads and a filter does not: what is decoded, where it stood, and what is left alone."""

from __future__ import annotations

import base64
import codecs
import time
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safeguard.text import View, views

SECRET = "hide the blue teapot"
BRAILLE = str.maketrans("hidetbluapo", "⠓⠊⠙⠑⠞⠃⠇⠥⠁⠏⠕")


def decoded(text: str) -> str | None:
    """The decoded reading, None where there is none."""
    return next((view.text for view in views(text) if view.name == "decoded"), None)


def reading(text: str) -> View:
    return next(view for view in views(text) if view.name == "decoded")


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    "code",
    [
        b64(SECRET),
        b64(SECRET).rstrip("="),
        base64.urlsafe_b64encode(SECRET.encode()).decode(),
        base64.encodebytes((SECRET * 4).encode()).decode().strip().replace("\n", "\r\n"),
        b64(SECRET)[1:] + "A",  # its beginning cut off
        base64.b64encode(SECRET.encode("utf-16-le")).decode(),
        base64.b64encode(SECRET.encode() + b"\xff\xfe").decode(),  # spoilt by two bytes that are no text
        base64.b32encode(SECRET.encode()).decode(),
        SECRET.encode().hex(),
        "0x" + SECRET.encode().hex().upper(),
        SECRET.encode().hex(" "),
        SECRET.encode().hex(":"),
        "".join(f"\\x{byte:02x}" for byte in SECRET.encode()),
        "".join(f"\\u{byte:04x}" for byte in SECRET.encode()),
        "".join(f"\\u{{{byte:x}}}" for byte in SECRET.encode()),
        "".join(f"\\U{byte:08x}" for byte in SECRET.encode()),
        "".join(f"\\{byte:03o}" for byte in SECRET.encode()),
        "".join(f"%{byte:02X}" for byte in SECRET.encode()),
        "".join(f"%u{byte:04x}" for byte in SECRET.encode()),
        "".join(f"={byte:02X}" for byte in SECRET.encode()),
        "".join(f"&#{byte};" for byte in SECRET.encode()),
        "".join(f"&#x{byte:x};" for byte in SECRET.encode()),
        "".join(f"&#{byte:08}" for byte in SECRET.encode()),  # browsers need neither semicolon nor few zeros
        " ".join(f"{byte:08b}" for byte in SECRET.encode()),
        "".join(f"{byte:08b}" for byte in SECRET.encode()),
        " ".join(str(byte) for byte in SECRET.encode()),
        ", ".join(str(byte) for byte in SECRET.encode()),
        ".... .. -.. . / - .... . / -... .-.. ..- . / - . .- .--. --- -",
        SECRET.translate(BRAILLE),
    ],
)  # fmt: skip
def test_what_a_code_says_is_read(code: str) -> None:
    found = decoded(f"do it: {code} :now")

    assert found is not None
    assert "the blue teapot" in found


@pytest.mark.parametrize(
    "code",
    [
        b64(b64(SECRET)),
        b64(quote(SECRET)),
        quote(b64(SECRET)),
        b64(SECRET.encode().hex()),
        b64(SECRET).encode().hex(),
        quote(quote(quote(SECRET))),
        "".join(f"&#{ord(c)};" for c in b64(SECRET)),
        codecs.encode(b64(SECRET), "rot13"),
        b64(codecs.encode(SECRET, "rot13")),
        b64("h1de the blu3 t3apot"),
        b64("h i d e the b l u e t e a p o t"),
        b64("ｈｉｄｅ ｔｈｅ ｂｌｕｅ ｔｅａｐｏｔ"),
        b64(b64(b64(SECRET))),
    ],
)
def test_codes_inside_codes_and_disguises_inside_codes_are_read(code: str) -> None:
    assert decoded(f"do it: {code}") == f"do it: {SECRET}"


@pytest.mark.parametrize("invisible", ["\u200b", "\u00ad", "\ufe0f"])
def test_a_code_under_a_disguise_is_read(invisible: str) -> None:
    assert decoded(invisible.join(b64(SECRET))) == SECRET
    assert decoded("".join(chr(ord(c) + 0xFEE0) for c in b64(SECRET))) == SECRET  # fullwidth


def test_more_than_three_codes_deep_is_left_as_it_is() -> None:
    code = SECRET
    for _ in range(12):
        code = b64(code)

    assert SECRET not in (decoded(code) or "")


@pytest.mark.parametrize(
    ("word", "code"),
    [("kill", "a2lsbA=="), ("kill", "a2lsbA"), ("kill", "6b696c6c"), ("kill", "6B 69 6C 6C")],
)
def test_a_code_of_one_short_word_is_read(word: str, code: str) -> None:
    assert decoded(f"to {code} him") == f"to {word} him"


@pytest.mark.parametrize("after", ["\n", "\n\n", "\r\n$", "\nBASE64 decoded:", "\nnow"])
def test_a_long_code_ends_with_its_line(after: str) -> None:
    code = b64(SECRET * 3)  # 60 bytes: 80 characters, none of them padding

    assert decoded(f"do it:\n{code}{after}") == f"do it:\n{SECRET * 3}{after}"


def test_codes_stand_at_the_end_of_paths_and_addresses() -> None:
    assert decoded(f"get example.com/{b64(SECRET)}") == f"get example.com/{SECRET}"
    assert decoded("q=hide%20the+blue+teapot") == "q=hide the blue teapot"


@pytest.mark.parametrize(
    "text",
    [
        "The commit 3f2a9c1e4b5d6f708192a3b4c5d6e7f8091a2b3c fixes it.",
        "sha256 e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "uuid 123e4567-e89b-12d3-a456-426614174000 and mac 00:1A:2B:3C:4D:5E",
        "call +1 (415) 555-0123 or 4155550123, card 4111 1111 1111 1111",
        "numbers 100 101 102 103 104 105 are in order; ages 34, 45, 67, 72, 81",
        "getElementById setTimeout XMLHttpRequest iPhone McDonald JavaScript PyTorch",
        "https://example.com/path/to/page?id=123&lang=en&x=A1b2C3",
        "for (int i = 0; i < n; i++) { x &= ~mask; y = a & b; }",
        'printf("%d%s\\n", x); C:\\users\\new\\table \\alpha \\beta \\frac{1}{2}',
        "if a=1 and b=2 then 50%off and 100% sure",
        "- - -\n* * * . . . ---- .... ...  ... wait",
        "E = mc^2, a_1 + b_2 = c_{12}, x=3F, INTRODUCTION TO ENVIRONMENTALISM",
        "ＡＢＣ株式会社は２０２４年にＬＬＣになりました",
        "नमस्ते दुनिया",
        "مرحبا بالعالم",
        "👩\u200d👩\u200d👧\u200d👦 👍🏽",
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==",
    ],
)
def test_what_only_looks_like_a_code_stays(text: str) -> None:
    assert decoded(text) is None


def test_the_span_of_what_was_decoded_is_that_of_its_code() -> None:
    code = b64(SECRET)  # 20 bytes: 28 characters
    view = reading(f"say {code} now")
    place = view.text.index("teapot")

    assert view.span(place, place + 6) == (4, 32)
    assert view.span(0, 3) == (0, 3)
    assert view.span(len(view.text) - 3, len(view.text)) == (33, 36)


def test_the_span_of_an_escaped_letter_is_its_escape() -> None:
    view = reading("a te&#97;pot")

    assert view.text == "a teapot"
    assert view.span(4, 5) == (4, 9)
    assert view.span(2, 8) == (2, 12)


def test_what_was_hidden_is_read_alone_too() -> None:
    tags = "".join(chr(0xE0000 + ord(c)) for c in SECRET)

    found = views(f"look: {b64(SECRET)} ok?")
    assert [view.name for view in found] == ["raw", "decoded", "hidden"]
    assert found[-1].text == SECRET
    assert views(f"look{tags}")[-1].text.strip() == SECRET
    assert views(f"look {tags}")[-1].name == "hidden"


def test_several_hidden_parts_stand_on_lines_of_their_own_with_their_spans() -> None:
    # "a " is 2, each code of 20 bytes is 28 characters, " b " between them: 2 to 30 and 33 to 61
    view = views(f"a {b64(SECRET)} b {b64(SECRET)}")[-1]
    second = view.text.rindex("teapot")

    assert view.text == f"{SECRET}\n{SECRET}"
    assert view.span(0, 4) == (2, 30)
    assert view.span(second, second + 6) == (33, 61)


def test_names_of_emoji_and_single_escapes_are_not_hidden_parts() -> None:
    assert [view.name for view in views("fish &amp; chips 😂 a%20b")] == ["raw", "normalised", "decoded"]


def test_a_text_without_codes_has_no_decoded_reading() -> None:
    assert [view.name for view in views("Please water the garden before sunset.")] == ["raw"]


CODES = st.sampled_from(
    ["a2lsbA==", "6b696c6c", "6b 69 ", "%6b", "&#107;", "&amp;", "\\x6b", "-.- ", ". ", "k", " ", "="]
)
"""Pieces of codes, to be put together at random."""
SIGNS = st.sampled_from(
    ["107 ", "01101011", "xvyy ", "lbh ", "kilo ", "⠅", "\u200b", "\u202e", "\u202c", "\x08", "é", "\ud800"]
)


@given(st.lists(CODES | SIGNS | st.text(max_size=3), max_size=25).map("".join))
@settings(max_examples=300, deadline=None)
def test_every_reading_leads_back_into_the_original_and_there_are_at_most_five(text: str) -> None:
    found = views(text)

    assert len(found) <= 5
    assert len({view.text for view in found}) == len(found)
    for view in found:
        assert len(view.starts) == len(view.ends) == len(view.text)
        assert list(view.starts) == sorted(view.starts)
        assert list(view.ends) == sorted(view.ends)
        assert all(0 <= start < end <= len(text) for start, end in zip(view.starts, view.ends, strict=True))


@pytest.mark.parametrize(
    "unit",
    ["&amp;", "&", "amp;", "A=", "a2lsbA==", "a2lsbA", "6b", "6b ", "a2lsbCB5b3Ug\n", "%6b", "%25", "\\x6b",
     ". ", "- . ", "10 ", "107 ", "01", "xvyy ", "xvyy the ", "kilo ", "kilo india ", "x\b", "\b", "\u202e",
     "\u202ea", "\u202e\u202c", "⠅", "=6B", "AAAAAAAAAAAAA ", "aA0/", "&#107;",
     "0x6b", "Zz0_-", "\u202aa\u202eb\u202c", "aG93 ", "tea**", 'a"+"', "a<b>",
     "chr(107)+", "150 "],
)  # fmt: skip
def test_the_work_grows_with_the_length_and_not_faster(unit: str) -> None:
    def seconds(size: int) -> float:
        text = (unit * size)[:size]
        started = time.process_time()
        views(text)
        return time.process_time() - started

    seconds(1000)
    small, large = (min(seconds(size) for _ in range(3)) for size in (5_000, 40_000))

    # eight times the text: linear is 8, quadratic 64; the sum is for small times on a busy machine
    assert large < 30 * small + 0.2


@pytest.mark.parametrize("unit", ["&amp;", "A=", "a2lsbA=="])
def test_a_megabyte_of_codes_takes_seconds_at_most_and_grows_no_reading(unit: str) -> None:
    text = unit * (1_000_000 // len(unit))
    started = time.process_time()
    found = views(text)

    assert time.process_time() - started < 10  # 0.4 measured
    assert all(len(view.text) <= len(text) for view in found)


def cut(code: str, size: int, between: str) -> str:
    return between.join(code[i : i + size] for i in range(0, len(code), size))


def each(form: str, between: str) -> str:
    return between.join(form.format(c) for c in SECRET.encode())


@pytest.mark.parametrize(
    "code",
    [
        cut(b64(SECRET), 4, " "),
        cut(b64(SECRET), 4, "\n"),
        cut(b64(SECRET), 4, "-"),
        cut(b64(SECRET), 10, "!"),
        cut(b64(SECRET), 8, '" + "'),
        cut(SECRET.encode().hex(), 4, " "),
        cut(SECRET.encode().hex(), 8, " "),
        cut(SECRET.encode().hex(), 4, "-"),
        each("{:02x}", "\n"),
        each("{:02x}", "."),
        each("{:02x}", "|"),
        each("{:02x}h", " "),
        each("U+{:04X}", " "),
        each("u{:04x}", " "),
        each("{}", "\n"),
        each("{}", "/"),
        each("chr({})", "+"),
        each("{:03o}", " "),
        each("{:08b}", "\n"),
        each("{:07b}", " "),
        each("&#{:020d};", ""),
        each(r"\\u{:04x}", ""),
        base64.b64encode(SECRET.encode("utf-16")).decode(),  # with its byte order mark
        base64.b64encode(SECRET.encode("utf-16-be")).decode(),
        "7" + SECRET.encode().hex(),  # half a byte before it
    ],
)
def test_a_code_cut_or_written_in_another_way_is_read(code: str) -> None:
    assert SECRET in (decoded(code) or "")


@pytest.mark.parametrize("text", ['"tea" + "pot"', "tea**pot", "tea<!-- -->pot", "tea<b></b>pot"])
def test_a_word_parted_by_marks_is_put_together(text: str) -> None:
    assert "teapot" in (decoded(text) or "")


@pytest.mark.parametrize(
    "text",
    ["that this with from", "ABCD EFGH IJKL MNOP", "1234-5678-9012-3456", "**bold** and <b>more</b> text"],
)
def test_groups_and_marks_of_honest_text_stay(text: str) -> None:
    assert decoded(text) is None
