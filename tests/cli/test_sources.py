from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from safeguard.cli import sources
from safeguard.cli.sources import Arriving, Entry, Lines, batches, pictures


@pytest.fixture
def pipe() -> Iterator[tuple[Arriving, int]]:
    """A reader of lines and the end of the pipe that is written to."""
    reading, writing = os.pipe()
    yield Arriving(reading), writing
    os.close(reading)


def test_lines_of_a_pipe_keep_their_ends(pipe: tuple[Arriving, int]) -> None:
    arriving, writing = pipe
    os.write(writing, b"one\n\nthree")
    os.close(writing)

    assert [arriving.readline(100) for _ in range(4)] == [b"one\n", b"\n", b"three", b""]


def test_a_long_line_of_a_pipe_comes_in_parts(pipe: tuple[Arriving, int]) -> None:
    arriving, writing = pipe
    os.write(writing, b"abcde\nf\n")
    os.close(writing)

    assert [arriving.readline(4) for _ in range(3)] == [b"abcd", b"e\n", b"f\n"]


def test_a_pipe_tells_whether_its_next_line_has_come_in(pipe: tuple[Arriving, int]) -> None:
    arriving, writing = pipe
    assert arriving.waits()
    os.write(writing, b"one\ntwo\n")
    assert not arriving.waits()
    arriving.readline(100)
    assert not arriving.waits()  # "two" is in the buffer already
    arriving.readline(100)
    assert arriving.waits()
    os.close(writing)
    assert not arriving.waits()  # its end can be read


def test_a_batch_ends_at_its_number_of_entries() -> None:
    entries = [Entry(str(i), "x") for i in range(5)]

    assert [len(batch) for batch in batches(entries, 2, 100)] == [2, 2, 1]


def test_a_batch_ends_at_its_number_of_characters() -> None:
    entries = [Entry("", "x" * size) for size in (4, 4, 4, 20, 1)]

    # 4 + 4 fit in 10, a third does not; 20 goes alone
    assert [len(batch) for batch in batches(entries, 100, 10)] == [2, 1, 1, 1]


def test_a_batch_ends_where_the_next_entry_has_not_come_in() -> None:
    answers = iter([False, True, False])

    found = batches([Entry("", "x")] * 3, 100, 100, waits=lambda: next(answers))
    assert [len(batch) for batch in found] == [2, 1]


def test_what_was_read_before_a_failure_comes_out_first() -> None:
    def failing() -> Iterator[Entry]:
        yield Entry("1", "x")
        raise ValueError("damaged")

    found = batches(failing(), 100, 100)
    assert len(next(found)) == 1
    with pytest.raises(ValueError, match="damaged"):
        next(found)


def test_a_line_of_any_length_is_refused_without_being_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 20)
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"text": "' + b"x" * 90 + b'"}\n{"text": "short"}\n')
    lines = Lines(str(path), "text", "text")
    found = list(lines)
    lines.close()

    assert found[0].bad == "line 1 is longer than 20 bytes"
    assert (found[1].name, found[1].item) == ("2", "short")


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "good"}\n')
    lines = Lines(str(path), "text", "text")
    (found,) = lines
    lines.close()

    assert (found.item, lines.size) == ("good", 20)  # 3 bytes of mark, 17 of line


@pytest.mark.parametrize("text", ["x" * 10_000, "a\0b", "a photo of a cat"])
def test_texts_that_name_no_file_are_texts(text: str) -> None:
    assert pictures([text], forced=False) is None


def test_forced_pictures_need_no_ending(tmp_path: Path) -> None:
    (tmp_path / "picture").write_bytes(b"")

    assert pictures([str(tmp_path / "picture")], forced=True) == ([tmp_path / "picture"], 0)
