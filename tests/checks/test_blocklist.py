"""The blocklist: what it finds, where, and what it leaves alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from safeguard.checks.blocklist import Blocklist
from safeguard.types import Span


@pytest.fixture
def check() -> Blocklist:
    return Blocklist({"weapons": ["knife", "pipe bomb"], "slang": ["daft", "knife"]})


def flags(check: Blocklist, text: str) -> set[str]:
    (found,) = check([text])
    return {category for category, score in found.scores.items() if score == 1.0}


def test_an_empty_batch_gives_no_findings(check: Blocklist) -> None:
    assert check([]) == []


def test_an_empty_text_scores_zero_in_every_category(check: Blocklist) -> None:
    assert check([""])[0].scores == {"weapons": 0.0, "slang": 0.0}


def test_an_entry_scores_one_in_each_of_its_categories_and_says_where(check: Blocklist) -> None:
    (found,) = check(["a sharp Knife!"])

    assert found.scores == {"weapons": 1.0, "slang": 1.0}
    # a, space, sharp, space: 8 characters before, five in the word
    assert found.spans == (Span(8, 13, "slang"), Span(8, 13, "weapons"))


def test_a_batch_gives_what_its_texts_give_one_by_one(check: Blocklist) -> None:
    texts = ["a knife", "", "nothing", "KNIFE and daft", "k n i f e", "ｋｎｉｆｅ", "ножик"]

    assert check(texts) == [check([text])[0] for text in texts]


@pytest.mark.parametrize("text", ["penknife", "knifes", "knife_edge", "adaft", "a pipe, a bomb", "knif e"])
def test_a_longer_word_or_a_parted_phrase_is_no_match(check: Blocklist, text: str) -> None:
    assert flags(check, text) == set()


@pytest.mark.parametrize("text", ["pipe bomb", "PIPE  bomb", "pipe\nbomb", "pipe \t bomb", "pipe\u00a0bomb"])
def test_a_space_in_a_phrase_matches_any_white_space(check: Blocklist, text: str) -> None:
    assert flags(check, text) == {"weapons"}


@pytest.mark.parametrize(
    "text",
    ["k n i f e", "kn1fe", "ｋｎｉｆｅ", "kn\u200bife", "knіfe", "k\u0336n\u0336ife", "kniiiife", "dáft"],
)
def test_a_disguised_entry_is_found(check: Blocklist, text: str) -> None:
    assert "slang" in flags(check, text)


def test_the_span_of_a_disguised_entry_covers_its_disguise(check: Blocklist) -> None:
    (found,) = check(["a d-a-f-t idea"])

    assert found.spans == (Span(2, 9, "slang"),)  # "a " before, four letters and three hyphens


def test_an_entry_in_a_script_without_spaces_needs_no_border() -> None:
    assert flags(Blocklist(["炸弹"]), "他做了一个炸弹吗") == {"blocklist"}


def test_an_entry_in_another_spaced_script_needs_borders() -> None:
    check = Blocklist(["нож"])

    assert [flags(check, text) for text in ("острый НОЖ тут", "ножик")] == [{"blocklist"}, set()]


def test_a_letter_that_grows_in_lower_case_keeps_the_offsets() -> None:
    (found,) = Blocklist(["straße"])(["die STRASSE, die Straße"])

    # casefold makes "strasse" of both: 4 to 11, and 17 to 23 where ß is one character
    assert found.spans == (Span(4, 11, "blocklist"), Span(17, 23, "blocklist"))


def test_an_entry_that_is_leetspeak_itself_does_not_block_the_plain_word() -> None:
    assert flags(Blocklist(["gr8"]), "what a great kn1fe") == set()


def test_an_emoji_can_be_an_entry() -> None:
    assert flags(Blocklist(["🍆"]), "look🍆here") == {"blocklist"}


@pytest.mark.parametrize("text", ["\ud800 knife", "knife \x00", "\U0010ffff knife", "knife\U000e0041"])
def test_strange_code_points_do_not_hide_an_entry(check: Blocklist, text: str) -> None:
    assert "weapons" in flags(check, text)


def test_an_entry_at_the_end_of_a_megabyte_is_found(check: Blocklist) -> None:
    (found,) = check(["a calm day " * 100_000 + "daft"])

    assert found.spans == (Span(1_100_000, 1_100_004, "slang"),)


def test_many_threads_share_one_blocklist(check: Blocklist) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: flags(check, "daft" if i % 2 else "calm"), range(64)))

    assert found == [set(), {"slang"}] * 32


def test_a_file_gives_its_name_as_the_category(tmp_path: Path) -> None:
    path = tmp_path / "weapons.txt"
    path.write_bytes("\ufeff# mild\r\nknife\r\n\r\n  pipe bomb  \n".encode())

    check = Blocklist.load(path)

    assert (check.name, check.labels) == ("blocklist/weapons", ("weapons",))
    assert [flags(check, text) for text in ("a knife", "pipe bomb", "mild")] == [
        {"weapons"},
        {"weapons"},
        set(),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"good\n\xff\xfe\n", "words.txt line 2 is not UTF-8: invalid start byte"),
        (b"good\nba\0d\n", "words.txt line 2 has a NUL character; a blocklist is plain text"),
        (b"x" * 1001, "words.txt line 1 has 1001 characters; an entry may have 1000"),
        (b"# only this\n", "words.txt has no entries; write one word or phrase on each line"),
        (b"a\n" * (8 * 2**20 + 1), "words.txt has 16777218 bytes, more than the 16777216"),
    ],
)
def test_a_file_that_is_no_blocklist_is_refused_with_its_line(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "words.txt"
    path.write_bytes(content)

    with pytest.raises(ValueError, match=message):
        Blocklist.load(path)


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Blocklist.load(tmp_path / "none.txt")


@pytest.mark.parametrize("words", [[], ["", "  "], {"weapons": []}])
def test_a_blocklist_without_words_is_refused(words: Any) -> None:
    with pytest.raises(ValueError, match="a blocklist needs at least one word, got none"):
        Blocklist(words)


@pytest.mark.parametrize("words", ["knife", b"knife", 3, {"weapons": "knife"}])
def test_a_bare_string_instead_of_a_list_is_refused(words: Any) -> None:
    with pytest.raises(TypeError, match="words must be a collection of strings, got "):
        Blocklist(words)


def test_an_entry_that_is_no_string_is_refused() -> None:
    with pytest.raises(TypeError, match="a blocklist entry must be a string, got NoneType"):
        Blocklist([None])  # type: ignore[list-item]


def test_the_digest_tells_lists_apart_and_ignores_order() -> None:
    one, same, other = Blocklist(["a", "b"]), Blocklist(["b", "a"]), Blocklist(["a", "c"])

    assert one.digest == same.digest != other.digest
    assert len(one.digest) == 64
