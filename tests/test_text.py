"""Normalisation: what is undone, what is left alone, and that every offset leads back to the original."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safeguard.text import View, normalise, views, windows

ROOT = Path(__file__).parent.parent

INVISIBLE = ["\u200d", "\u200b", "\u200c", "\ufe0f", "\u0301", "\u0336", "\U000e0061", "\U000e0101", "\x00"]
ODD = st.sampled_from(
    list("kilhate13450@$!|+ .-_*'")
    + list("аесоукιοαｋｉ𝐥éñ😀👍🏽🇩🇪🅰ﬁ½…हिन्दीمی한中")
    + ["\ud800", "\u20e3", "aaa", "kill", *INVISIBLE]
)
ODD_TEXT = st.one_of(st.text(), st.lists(ODD, max_size=20).map("".join))


def plain(text: str) -> str:
    return normalise(text).text


@pytest.mark.parametrize(
    ("disguised", "clear"),
    [
        ("ｋｉｌｌ", "kill"),
        ("𝐤𝐢𝐥𝐥 𝓀𝒾𝓁𝓁 ⓚⓘⓛⓛ", "kill kill kill"),
        ("🅺🅸🅻🅻 🅰️🅱️", "KILL AB"),
        ("ᴋɪʟʟ", "kill"),
        ("k̶i̶l̶l̶", "kill"),
        ("z̴̢̛a̷lgo", "zalgo"),
        ("naïve café Đà Nẵng", "naive cafe Da Nang"),
    ],
)
def test_other_forms_of_latin_letters_become_plain_ones(disguised: str, clear: str) -> None:
    assert plain(disguised) == clear


@pytest.mark.parametrize(
    "invisible",
    [
        "\u200b",
        "\u200c",
        "\u200d",
        "\u2060",
        "\ufeff",
        "\u00ad",
        "\u202e",
        "\u2066",
        "\ufe0f",
        "\x00",
        "\u3164",
    ],
)
def test_invisible_characters_between_letters_go(invisible: str) -> None:
    assert plain(invisible.join("kill")) == "kill"


def test_ascii_hidden_in_tag_characters_is_shown() -> None:
    hidden = "".join(chr(0xE0000 + ord(c)) for c in "kill them")

    assert plain(f"hello{hidden}") == "hello kill them "


def test_tags_closed_like_those_of_a_flag_are_a_message_all_the_same() -> None:
    hidden = "".join(chr(0xE0000 + ord(c)) for c in "kill them")

    assert plain(f"🏴{hidden}\U000e007f") == " black flag  kill them "


def test_ascii_hidden_in_the_supplement_of_variation_selectors_is_shown() -> None:
    # garak's scheme: character c is U+E0100 + c, without Butler's 16 less
    hidden = "".join(chr(0xE0100 + ord(c)) for c in "kill them")

    assert plain(f"hello{hidden}") == "hello kill them "


def test_bits_of_seven_to_a_letter_are_shown() -> None:
    # Rehberger's sneaky bits: bin() of each letter, U+200B for a space
    code = {ord("0"): "\u2062", ord("1"): "\u2064", ord(" "): "\u200b"}
    hidden = " ".join("".join(f"{ord(c):b}" for c in word) for word in ("kill", "them")).translate(code)

    assert plain(f"hello{hidden}") == "hello kill them "


def test_bytes_hidden_in_variation_selectors_are_shown() -> None:
    # Butler's scheme: byte b below 16 is U+FE00 + b, others U+E0100 + b - 16
    hidden = "".join(chr(0xE0100 + b - 16) for b in b"kill them")

    assert plain("😀" + hidden) == " grinning face  kill them "


def test_variation_selectors_that_spell_no_text_go() -> None:
    assert plain("go\U000e01ef\U000e01ef on") == "go on"  # bytes ff ff are no UTF-8


def test_bits_hidden_in_invisible_operators_are_shown() -> None:
    # U+2062 is 0 and U+2064 is 1: 01101000 01101001 is "hi", which may be letters of a word, so no spaces
    hidden = "0110100001101001".replace("0", "\u2062").replace("1", "\u2064")

    assert plain(f"say {hidden}.") == "say hi."


@pytest.mark.parametrize(
    ("disguised", "clear"),
    [
        ("кill", "kill"),
        ("yоu аrе", "you are"),
        ("I will кιll τhem", "I will kill them"),
        ("Ꮶill", "Kill"),
        ("you are сор", "you are cop"),  # wholly Cyrillic letters in a Latin text
    ],
)
def test_letters_of_other_scripts_that_pose_as_latin_are_replaced(disguised: str, clear: str) -> None:
    assert plain(disguised) == clear


@pytest.mark.parametrize(
    "text",
    [
        "Это русский текст, а не маска",
        "сука",
        "Αυτό είναι ένα κείμενο",
        "Я читаю книгу Linux каждый день",
        "שלום עולם",
        "مرحبا بالعالم",
        "می\u200cخواهم",
        "क्\u200dष हिन्दी",
        "ภาษาไทยทำได้",
        "今天天气很好，你好",
        "こんにちは、カタカナ",
        "안녕하세요 ㅋㅋㅋ",
        "Բարեւ Ձեզ",
        "ﷺ",
    ],
)
def test_honest_text_in_other_scripts_stays(text: str) -> None:
    assert plain(text) == text


@pytest.mark.parametrize(
    ("disguised", "clear"),
    [
        ("k i l l", "kill"),
        ("k i l l  y o u", "kill  you"),
        ("k i l l.", "kill."),
        ("k.i.l.l", "kill"),
        ("k-i-l-l", "kill"),
        ("k_i_l_l", "kill"),
        ("k*i*l*l", "kill"),
        ("k . i . l . l", "kill"),
        ("k\ni\nl\nl", "kill"),
        ("I h a t e y o u", "I hate you"),
        ("h.a.t.e t.h.e.m", "hate them"),
        ("k 1 l l", "kill"),
    ],
)
def test_letters_set_apart_are_joined(disguised: str, clear: str) -> None:
    assert plain(disguised) == clear


@pytest.mark.parametrize(
    ("disguised", "clear"),
    [
        ("k1ll", "kill"),
        ("h4te", "hate"),
        ("$h1t", "shit"),
        ("5h00t", "shoot"),
        ("k!ll", "kill"),
        ("@ss", "ass"),
        ("a$$", "ass"),
        ("H4TE", "HATE"),
        ("he11", "hell"),
        ("sh!t", "shit"),
        ("b@stard", "bastard"),
        ("ha+e", "hate"),
        ("h8 h8ing gr8", "hate hating great"),
        ("f4ggh0le", "fagghole"),  # no word, but two signs between letters
        ("y0u 4r3 5h17", "you are shit"),  # edges count where much is plainly leetspeak
    ],
)
def test_leetspeak_is_undone(disguised: str, clear: str) -> None:
    assert plain(disguised) == clear


@pytest.mark.parametrize(
    "text",
    [
        "mp3",
        "3d",
        "h264",
        "2024",
        "4k",
        "b2b",
        "python3",
        "1st",
        "$5",
        "a@b.com",
        "C++",
        "sha256",
        "v1.2.3",
        "covid19",
        "ps5",
        "1girl",
        "f1.8",
        "35mm",
        "10am",
        "90s",
        "i18n",
        "k8s",
        "a11y",
        "h1n1",
        "player5",
        "type1",
        "$HOME",
        "$name",
        "@anna",
        "c++",
        "LGBTQ+",
        "x+y",
        "a|b",
        "wow!that",
        "log4j",
        "3f2a9c1e",
        "H2O",
        "A4",
        "US$5",
        "1-2-3",
        "5-7",
        "j0hn@ex4mple.com",
        "192.168.0.1",
        "4x4",
        "f*ck",
        "s**t",
        "kill!",
        "!important",
        "google+",
        "50%",
        "1/2",
        "12:30",
        "e.g.",
        "O'Brien",
        "it's",
    ],  # fmt: skip
)
def test_ordinary_tokens_stay(text: str) -> None:
    assert plain(f"see {text} here") == f"see {text} here"


@pytest.mark.parametrize(
    "text",
    [
        "in a 5 km run, I saw 2 x 4 of 1 2 3 4",
        "if (a != b && c == d) { x1 = y2; i++; }",
        "for i in range(10): print(f'{i:02d}')",
        "x + y = z, 3 * 4 = 12, a < b",
        "Buy 2 AAA batteries at www.example.com, part III",
        "That's a good idea, I'm a fan",
        "© 2024 → 20 °C ✓",
    ],
)
def test_ordinary_sentences_stay(text: str) -> None:
    assert plain(text) == text
    assert len(views(text)) == 1


@pytest.mark.parametrize(
    ("drawn", "clear"),
    [
        ("kiiiiilll", "kill"),
        ("looooove", "love"),
        ("wrooonngg", "wrong"),
        ("AAA", "AAA"),
        ("KIIILL", "KILL"),
        ("zzqqqq", "zzqq"),
        ("a" * 50, "aa"),
        ("Thhe lettters sshould be shorrter", "The letters should be shorter"),  # doubled beside drawn out
        ("Thhe Matt and Hanna", "Thhe Matt and Hanna"),  # nothing is plainly drawn out, so nothing is touched
        ("sooo, Mattz is here", "so, Mattz is here"),  # no word without its second t
    ],
)
def test_drawn_out_letters_are_cut(drawn: str, clear: str) -> None:
    assert plain(drawn) == clear


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("I 😀 you", "I  grinning face  you"),
        ("hello👋world", "hello waving hand world"),
        ("👍🏿", " thumbs up "),
        ("👩🏽\u200d🚀", " woman astronaut "),
        ("❤️", " red heart "),
        ("🇩🇪🇫🇷", " Germany  France "),
        ("🇰🇮🇱🇱", "KILL"),  # not two flags, so letters
        ("🇲🇴🇻🇪 it", "MOVE it"),  # Macau and Venezuela, but a word
        ("🇮🇹", " Italy "),  # one flag is a flag, whatever it spells
        ("1️⃣", " keycap 1 "),
        ("😂😂😂😂😂", " face with tears of joy " * 3),
        ("🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f", " England "),
    ],
)
def test_emoji_become_their_names(text: str, words: str) -> None:
    assert plain(text) == words


def test_disguises_inside_disguises_are_undone() -> None:
    assert plain("k\u200b.\u200b𝟏.ｌ.l") == "kill"


def test_case_stays() -> None:
    assert plain("HeLLo ＷＯＲＬＤ") == "HeLLo WORLD"


@given(ODD_TEXT)
@settings(max_examples=300, deadline=None)
def test_every_offset_leads_into_the_original_and_none_goes_back(text: str) -> None:
    view = normalise(text)

    assert len(view.starts) == len(view.ends) == len(view.text)
    assert list(view.starts) == sorted(view.starts)
    assert list(view.ends) == sorted(view.ends)
    assert all(0 <= start < end <= len(text) for start, end in zip(view.starts, view.ends, strict=True))


@given(ODD_TEXT)
@settings(max_examples=300, deadline=None)
def test_a_normalised_text_is_normal(text: str) -> None:
    once = plain(text)

    assert plain(once) == once


@given(ODD_TEXT, ODD_TEXT)
@settings(max_examples=100, deadline=None)
def test_the_span_of_a_word_holds_what_made_it(before: str, after: str) -> None:
    text = f"{before}\n\nzq\u200bｊx\n\n{after}"  # of letters that no rule or neighbour touches
    view = normalise(text)
    place = view.text.find("zqjx")

    assert place < 0 or "zqjx" in before + after or text[slice(*view.span(place, place + 4))].endswith("ｊx")


def test_the_span_of_a_disguised_word_is_exact() -> None:
    text = "go k.i\u200b.l.l 😀 now"
    view = normalise(text)
    word, face = view.text.index("kill"), view.text.index("face")

    # "go " is 3 characters; k.i, zero-width space, .l.l is 8; a space; the emoji is at 12
    assert view.span(word, word + 4) == (3, 11)
    assert view.span(face, face + 4) == (12, 13)


def test_an_empty_span_is_empty_in_the_original() -> None:
    view = normalise("k\u200bill")

    assert [view.span(0, 0), view.span(1, 1), view.span(4, 4)] == [(0, 0), (2, 2), (5, 5)]
    assert normalise("").span(0, 0) == (0, 0)


@pytest.mark.parametrize(("start", "end"), [(-1, 2), (0, 5), (3, 2), (9, 9)])
def test_a_span_outside_the_view_is_refused(start: int, end: int) -> None:
    with pytest.raises(
        ValueError, match=f"span must lie in 0 to 4 and not be reversed, got {start} to {end}"
    ):
        normalise("kill").span(start, end)


def test_a_plain_text_has_one_view() -> None:
    assert [view.name for view in views("a calm day")] == ["raw"]


def test_a_disguised_text_has_the_raw_view_first() -> None:
    assert [(view.name, view.text) for view in views("k1ll")] == [("raw", "k1ll"), ("normalised", "kill")]


def test_the_raw_view_maps_each_character_to_itself() -> None:
    assert views("déjà")[0].span(1, 3) == (1, 3)


@pytest.mark.parametrize(
    "unit",
    [
        "a ",
        "a.",
        "a.-",
        "k1ll ",
        "1",
        "a1",
        "!",
        "a!",
        "@",
        "aaab",
        "aaabbb",
        "кill ",
        "кот и ",
        "a\u0301\u0302",
        "\u200d",
    ]
    + [
        "😀",
        "😀\u200d",
        "🇩",
        "\U000e0061",
        "\ufe01",
        "\u2062",
        "ｋ",
        "今天",
        "ﷺ",
        "\ud800",
        "a\u200c",
        "_a",
        "$a",
    ],
)
def test_the_work_grows_with_the_length_and_not_faster(unit: str) -> None:
    def seconds(size: int) -> float:
        text = (unit * size)[:size]
        started = time.process_time()
        normalise(text)
        return time.process_time() - started

    seconds(1000)
    small, large = min(seconds(5_000), seconds(5_000)), seconds(40_000)

    # eight times the text: linear is 8, quadratic 64; the sum is for small times on a busy machine
    assert large < 30 * small + 0.2


def test_importing_costs_no_word_list_and_no_emoji_table() -> None:
    code = "import sys, safeguard.text; sys.exit('emoji' in sys.modules or 'numpy' in vars(safeguard.text))"

    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    ("length", "size", "overlap", "expected"),
    [
        (0, 8, 2, [(0, 0)]),
        (8, 8, 2, [(0, 8)]),
        (9, 8, 2, [(0, 8), (1, 9)]),
        (20, 8, 2, [(0, 8), (6, 14), (12, 20)]),  # starts step by 6, the third ends exactly
        (21, 8, 2, [(0, 8), (6, 14), (12, 20), (13, 21)]),
        (5, 2, 0, [(0, 2), (2, 4), (3, 5)]),
    ],
)
def test_windows_cover_the_whole(
    length: int, size: int, overlap: int, expected: list[tuple[int, int]]
) -> None:
    assert windows(length, size, overlap) == expected


@given(st.integers(0, 500), st.integers(1, 60), st.integers(0, 59))
def test_windows_are_full_and_share_the_overlap(length: int, size: int, overlap: int) -> None:
    overlap = min(overlap, size - 1)
    found = windows(length, size, overlap)

    assert (found[0][0], found[-1][1]) == (0, length)
    assert all(end - start == min(size, length) for start, end in found)
    assert all(end - start >= overlap for (_, end), (start, _) in zip(found, found[1:], strict=False))


@pytest.mark.parametrize(
    ("length", "size", "overlap"), [(10, 4, 4), (10, 4, 5), (-1, 4, 0), (10, 0, 0), (10, 4, -1)]
)
def test_windows_that_cannot_be_are_refused(length: int, size: int, overlap: int) -> None:
    with pytest.raises(ValueError, match="windows need length >= 0 and size > overlap >= 0, got "):
        windows(length, size, overlap)


def test_a_view_is_frozen() -> None:
    with pytest.raises(AttributeError):
        View("raw", "a", [0], [1]).text = "b"  # type: ignore[misc]


def test_no_long_text_is_kept_between_calls() -> None:
    pieces = ["\U0001f600\u200d" * 20_000 + "\U0001f600", "\U0001f1e6" * 50_000]
    normalise("\U0001f600\U0001f1e6\U0001f1ea")  # what is loaded once
    tracemalloc.start()
    for i in range(8):
        for piece in pieces:
            normalise(piece + chr(0x1F1E6 + i))
    gc.collect()
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 300_000  # one of the texts has 160,000 bytes or more
