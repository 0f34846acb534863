from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from safeguard.cli.judge import TEXTS_AT_ONCE
from tests.cli.conftest import Run, reports, rows_file


def test_each_row_is_written_back_with_its_report(run: Run, policy: Path, tmp_path: Path) -> None:
    source = rows_file(tmp_path / "in.jsonl", {"id": 7, "text": "rude"}, {"text": "good", "tags": ["é"]})
    out = tmp_path / "out.jsonl"
    result = run("check", "--input", source, "--output", out, "--policy", policy)
    rows = reports(out.read_text(encoding="utf-8"))

    assert result.exit_code == 1
    assert result.stdout == ""
    assert [{k: v for k, v in row.items() if k != "report"} for row in rows] == [
        {"id": 7, "text": "rude"},
        {"text": "good", "tags": ["é"]},
    ]
    assert [row["report"]["action"] for row in rows] == ["block", "allow"]


def test_more_rows_than_one_batch_keep_their_order(run: Run, policy: Path, tmp_path: Path) -> None:
    count = 2 * TEXTS_AT_ONCE + 1
    rude = {0, TEXTS_AT_ONCE - 1, TEXTS_AT_ONCE, count - 1}
    texts = [{"n": n, "text": "rude" if n in rude else "good"} for n in range(count)]
    source, out = rows_file(tmp_path / "in.jsonl", *texts), tmp_path / "out.jsonl"
    run("check", "--input", source, "--output", out, "--policy", policy)
    rows = reports(out.read_text(encoding="utf-8"))

    assert [row["n"] for row in rows] == list(range(count))
    assert {row["n"] for row in rows if row["report"]["blocked"]} == rude


def test_another_field_can_be_named(run: Run, policy: Path, tmp_path: Path) -> None:
    source = rows_file(tmp_path / "in.jsonl", {"prompt": "rude", "text": "good"})

    assert run("check", "--input", source, "--field", "prompt", "--policy", policy).exit_code == 1


def test_a_packed_file_is_read_and_written(run: Run, policy: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl.gz", tmp_path / "out.jsonl.gz"
    source.write_bytes(gzip.compress(b'{"text": "rude"}\n'))
    result = run("check", "--input", source, "--output", out, "--policy", policy)

    assert result.exit_code == 1
    assert len(reports(gzip.decompress(out.read_bytes()).decode())) == 1


def test_a_damaged_packed_file_ends_with_2_and_keeps_what_was_judged(
    run: Run, policy: Path, tmp_path: Path
) -> None:
    source, out = tmp_path / "in.jsonl.gz", tmp_path / "out.jsonl"
    packed = gzip.compress(b'{"text": "good"}\n' * 50_000)
    source.write_bytes(packed[: len(packed) // 2])
    result = run("check", "--input", source, "--output", out, "--policy", policy)

    assert result.exit_code == 2
    assert "the packed file is damaged after line" in result.stderr
    assert (tmp_path / "out.jsonl.part").stat().st_size > 0


def test_a_file_can_be_written_over_itself(run: Run, policy: Path, tmp_path: Path) -> None:
    source = rows_file(tmp_path / "in.jsonl", {"text": "rude"})
    run("check", "--input", source, "--output", source, "--policy", policy)

    assert reports(source.read_text(encoding="utf-8"))[0]["report"]["action"] == "block"


def test_a_dash_reads_lines_from_and_writes_rows_to_the_standard_streams(run: Run, policy: Path) -> None:
    result = run(
        "check", "--input", "-", "--output", "-", "--policy", policy, stdin='{"text": "rude", "id": 1}\n'
    )

    (row,) = reports(result.stdout)
    assert row["id"] == 1
    assert row["report"]["blocked"] is True


def test_text_that_is_no_valid_unicode_is_written_escaped(
    run: Run, write_policy: Callable[..., Path], tmp_path: Path
) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"text": "\\ud800"}\n', encoding="utf-8")
    run("check", "--input", source, "--output", out, "--policy", write_policy())

    assert reports(out.read_text(encoding="utf-8"))[0]["text"] == "\ud800"


BAD_LINES = [
    ("{", "line 2 is not JSON"),
    ("[1]", "line 2 must hold an object, got list"),
    ('{"prompt": "x"}', "line 2 has no field 'text'; its fields: 'prompt'"),
    ('{"text": 3}', "line 2: 'text' must be text, got int"),
    ("", "line 2 is empty"),
    ('{"text": "x", "n": NaN}', "line 2 is not JSON: NaN is no JSON number"),
    ('{"text": "x", "n": 1e999}', "line 2 is not JSON: a number is too large"),
    ("[" * 100_000, "line 2 is not JSON"),
]


@pytest.mark.parametrize(("line", "why"), BAD_LINES)
def test_a_bad_line_ends_with_2_and_keeps_what_was_judged(
    run: Run, policy: Path, tmp_path: Path, line: str, why: str
) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(f'{{"text": "rude"}}\n{line}\n{{"text": "good"}}\n', encoding="utf-8")
    result = run("check", "--input", source, "--output", out, "--policy", policy)

    assert result.exit_code == 2
    assert f"error: {why}" in result.stderr
    assert "incomplete: what was judged so far is in" in result.stderr
    assert not out.exists()
    assert len(reports((tmp_path / "out.jsonl.part").read_text(encoding="utf-8"))) == 1


@pytest.mark.parametrize(("line", "why"), BAD_LINES)
def test_a_skipped_bad_line_leaves_an_error_in_its_place(
    run: Run, policy: Path, tmp_path: Path, line: str, why: str
) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(f'{{"text": "rude"}}\n{line}\n{{"text": "good"}}\n', encoding="utf-8")
    result = run("check", "--skip-bad", "--input", source, "--output", out, "--policy", policy)
    rows = reports(out.read_text(encoding="utf-8"))

    assert result.exit_code == 2
    assert [sorted(row) for row in (rows[0], rows[2])] == [["report", "text"]] * 2
    assert rows[1]["error"].startswith(why)


def test_empty_lines_at_the_end_are_no_lines(run: Run, policy: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "good"}\n\n\n', encoding="utf-8")
    result = run("check", "--input", source, "--json", "--policy", policy)

    assert result.exit_code == 0
    assert len(reports(result.stdout)) == 1


def test_an_empty_file_is_clean_and_gives_an_empty_file(run: Run, policy: Path, tmp_path: Path) -> None:
    source, out = rows_file(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"

    assert run("check", "--input", source, "--output", out, "--policy", policy).exit_code == 0
    assert out.read_bytes() == b""


def test_a_device_is_written_to_and_not_replaced(run: Run, policy: Path, tmp_path: Path) -> None:
    source, pipe = rows_file(tmp_path / "in.jsonl", {"text": "good"}), tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        run("check", "--input", source, "--output", pipe, "--policy", policy)
        assert len(reports(os.read(reader, 10_000).decode())) == 1
        assert pipe.is_fifo()
    finally:
        os.close(reader)
