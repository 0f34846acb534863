from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from safeguard.errors import PackNotFound
from safeguard.packs import resolve
from safeguard.schemas import ReportData
from tests.cli.conftest import Run, reports, rows_file
from tests.tiny_packs import HIGH, LOW, red_pack

# --- texts ----------------------------------------------------------------------------------------


def test_a_clean_text_exits_with_0(run: Run, policy: Path) -> None:
    assert run("check", "a good day", "--policy", policy).exit_code == 0


def test_a_flagged_text_exits_with_1(run: Run, policy: Path) -> None:
    assert run("check", "a good day", "a rude day", "--policy", policy).exit_code == 1


def test_json_is_one_report_a_line_in_the_order_of_the_texts(run: Run, policy: Path) -> None:
    result = run("check", "rude", "good", "rude day", "--json", "--policy", policy)

    assert [r["action"] for r in reports(result.stdout)] == ["block", "allow", "block"]
    assert [r["risk"] for r in reports(result.stdout)] == [
        pytest.approx(HIGH, rel=1e-6),
        pytest.approx(LOW, rel=1e-6),
        pytest.approx(HIGH, rel=1e-6),
    ]
    assert result.stderr == ""


def test_a_printed_report_meets_the_published_schema(run: Run, policy: Path) -> None:
    (report,) = reports(run("check", "rude", "--json", "--policy", policy).stdout)

    assert ReportData.model_validate(report).flagged == ["toxic"]


def test_the_table_says_what_was_done_and_why_but_not_the_text(run: Run, policy: Path) -> None:
    result = run("check", "such a rude remark", "--policy", policy)

    assert "block" in result.stdout
    assert "toxic" in result.stdout
    assert "1 judged: 0 clean, 1 flagged, 0 with errors; policy tiny" in result.stdout
    assert "remark" not in result.output


def test_show_text_shows_it_with_control_characters_made_harmless(run: Run, policy: Path) -> None:
    result = run("check", "good\x1b[31m day", "--show-text", "--policy", policy)

    assert "text: good\\x1b[31m day" in result.stdout


def test_the_stage_output_is_judged_by_the_rules_of_results(
    run: Run, write_policy: Callable[..., Path]
) -> None:
    policy = write_policy(llm=("ignore: [toxic]",))

    assert run("check", "rude", "--policy", policy).exit_code == 0
    assert run("check", "rude", "--stage", "output", "--policy", policy).exit_code == 1


def test_monitoring_exits_with_1_as_well(run: Run, write_policy: Callable[..., Path]) -> None:
    result = run("check", "rude", "--json", "--policy", write_policy("mode: monitor"))

    assert result.exit_code == 1
    assert reports(result.stdout)[0]["action"] == "monitor"


def test_without_the_refiner_what_would_be_refined_is_blocked(
    run: Run, write_policy: Callable[..., Path]
) -> None:
    policy = write_policy("refiner: no-such-refiner")
    result = run("check", "rude", "--task", "t2i", "--no-refine", "--json", "--policy", policy)

    assert result.exit_code == 1
    assert reports(result.stdout)[0]["action"] == "block"
    assert reports(result.stdout)[0]["revised_prompt"] is None


def test_a_refined_prompt_is_in_its_report_and_exits_with_1(
    run: Run, write_policy: Callable[..., Path]
) -> None:
    policy = write_policy("refiner: span-softener")
    result = run("check", "a naked day", "--task", "t2i", "--json", "--policy", policy)

    assert result.exit_code == 1
    (report,) = reports(result.stdout)
    assert (report["action"], report["refiner"]) == ("refine", "span-softener")
    assert report["revised_prompt"] == "a fully clothed day"  # the first word of the softener's data file
    assert report["risk"] == pytest.approx(HIGH, rel=1e-6)  # of what was asked for


def test_the_table_shows_why_a_prompt_was_refined(run: Run, write_policy: Callable[..., Path]) -> None:
    policy = write_policy("refiner: span-softener")
    result = run("check", "a naked day", "--task", "t2i", "--show-text", "--policy", policy)

    assert "toxic" in result.stdout
    assert "revised: a fully clothed day" in result.stdout


def test_what_cannot_be_judged_exits_with_2_even_beside_flagged_ones(run: Run, policy: Path) -> None:
    too_long = "good " * 21  # 105 characters, max_chars is 100
    result = run("check", "rude", too_long, "--json", "--policy", policy)

    assert result.exit_code == 2
    assert [r["failed"] for r in reports(result.stdout)] == [False, True]


def test_what_is_let_through_unjudged_exits_with_2_as_well(
    run: Run, write_policy: Callable[..., Path]
) -> None:
    result = run("check", "good " * 21, "--json", "--policy", write_policy("on_error: allow"))

    assert result.exit_code == 2
    assert reports(result.stdout)[0]["action"] == "monitor"


def test_a_policy_that_judges_nothing_there_is_an_error(run: Run, tmp_path: Path) -> None:
    empty = tmp_path / "empty.yaml"
    empty.write_text("name: empty\n", encoding="utf-8")
    result = run("check", "rude", "--policy", empty)

    assert result.exit_code == 2
    assert "policy 'empty' has no checks at input.llm: nothing would be judged" in result.stderr


# --- standard input -------------------------------------------------------------------------------


def test_standard_input_is_one_text_a_line(run: Run, policy: Path) -> None:
    result = run("check", "--json", "--policy", policy, stdin="good\r\nrude\n\nday")

    assert [r["action"] for r in reports(result.stdout)] == ["allow", "block", "allow", "allow"]


def test_a_dash_is_standard_input(run: Run, policy: Path) -> None:
    assert len(reports(run("check", "-", "--json", "--policy", policy, stdin="a\nb\n").stdout)) == 2


def test_whole_takes_standard_input_as_one_text(run: Run, policy: Path) -> None:
    result = run("check", "--whole", "--json", "--policy", policy, stdin="good\nrude\n")

    assert [r["action"] for r in reports(result.stdout)] == ["block"]


def test_a_line_that_is_not_utf8_ends_with_2_after_the_lines_before_it(run: Run, policy: Path) -> None:
    result = run("check", "--json", "--policy", policy, stdin=b"rude\n\xff\ngood\n")

    assert result.exit_code == 2
    assert len(reports(result.stdout)) == 1
    assert "error: line 2 is not UTF-8 text (byte 0)" in result.stderr


def test_a_line_that_is_not_utf8_can_be_skipped(run: Run, policy: Path) -> None:
    result = run("check", "--json", "--skip-bad", "--policy", policy, stdin=b"rude\n\xff\ngood\n")

    assert result.exit_code == 2
    assert [r.get("action") for r in reports(result.stdout)] == ["block", None, "allow"]


# --- pictures -------------------------------------------------------------------------------------


@pytest.fixture
def picture_policy(tmp_path: Path) -> Path:
    """Pictures judged by a tiny pack that flags red ones."""
    path = tmp_path / "pictures.yaml"
    checks = f'checks: ["{red_pack(tmp_path / "red").as_posix()}"]'
    path.write_text(f"output:\n  image: {{{checks}, action: replace}}\n", encoding="utf-8")
    return path


@pytest.fixture
def gallery(tmp_path: Path) -> Path:
    """A folder with two pictures, one of them further down, and a file that is none."""
    folder = tmp_path / "gallery"
    (folder / "more").mkdir(parents=True)
    Image.new("RGB", (40, 30), "green").save(folder / "a.png")
    Image.new("RGB", (40, 30), "blue").save(folder / "more" / "b.JPG")
    (folder / "notes.txt").write_text("none", encoding="utf-8")
    return folder


def test_pictures_of_a_folder_are_judged_as_results(run: Run, picture_policy: Path, gallery: Path) -> None:
    result = run("check", gallery, "--json", "--policy", picture_policy)

    assert result.exit_code == 0
    assert [r["verdicts"][0]["stage"] for r in reports(result.stdout)] == ["output", "output"]
    assert "left out, not pictures by their endings: 1 files" in result.stderr


def test_a_flagged_picture_exits_with_1(run: Run, picture_policy: Path, gallery: Path) -> None:
    Image.new("RGB", (40, 30), "red").save(gallery / "a.png")
    result = run("check", gallery / "a.png", gallery / "more" / "b.JPG", "--policy", picture_policy)

    assert result.exit_code == 1
    assert "2 judged: 1 clean, 1 flagged, 0 with errors" in result.stdout


def test_rows_of_pictures_name_their_files(
    run: Run, picture_policy: Path, gallery: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    run("check", gallery, "--output", out, "--policy", picture_policy)

    names = [row["path"] for row in reports(out.read_text(encoding="utf-8"))]
    assert names == [str(gallery / "a.png"), str(gallery / "more" / "b.JPG")]


def test_paths_in_lines_are_relative_to_the_file(
    run: Run, picture_policy: Path, gallery: Path, tmp_path: Path
) -> None:
    source = rows_file(tmp_path / "in.jsonl", {"file": "gallery/a.png"})
    result = run(
        *("check", "--input", source, "--field", "file", "--kind", "image", "--json"),
        *("--policy", picture_policy),
    )

    assert result.exit_code == 0
    assert len(reports(result.stdout)) == 1


def test_a_picture_that_cannot_be_read_ends_with_2_and_does_not_hold_up_the_others(
    run: Run, picture_policy: Path, gallery: Path
) -> None:
    (gallery / "a.png").write_bytes(b"no picture")
    result = run("check", gallery, "--json", "--policy", picture_policy)

    assert result.exit_code == 2
    assert [r["failed"] for r in reports(result.stdout)] == [True, False]


def test_kind_text_judges_the_name_of_a_picture_as_a_text(run: Run, policy: Path) -> None:
    assert run("check", "rude.png", "--kind", "text", "--policy", policy).exit_code == 1


# --- wrong arguments ------------------------------------------------------------------------------

WRONG = [
    (["check", "x", "--preset", "nix"], "no preset named 'nix'; known: monitor, lenient, standard, strict"),
    (["check", "x", "--policy", "nix.yaml"], "nix.yaml: No such file or directory"),
    (["check", "x", "--policy", "a.yaml", "--preset", "strict"], "give --preset or --policy, not both"),
    (["check", "nix.png"], "nix.png: no such picture"),
    (["check", "x", "nix.png"], "give texts or pictures, not both"),
    (["check", "x", "--whole"], "--whole is for standard input"),
    (["check", "x", "--input", "in.jsonl"], "give texts, pictures or --input, one of them"),
    (["check", "--input", "nix.jsonl"], "nix.jsonl: No such file or directory"),
    (["check", "x", "--json", "--output", "-"], "--json and --output - both write to standard output"),
]


@pytest.mark.parametrize(("arguments", "why"), WRONG)
def test_wrong_arguments_are_one_line_and_exit_with_2(run: Run, arguments: list[str], why: str) -> None:
    result = run(*arguments)

    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {why}")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_an_unknown_option_exits_with_2(run: Run) -> None:
    assert run("check", "x", "--nix").exit_code == 2


def test_a_folder_without_pictures_is_an_error(run: Run, tmp_path: Path) -> None:
    result = run("check", tmp_path)

    assert result.exit_code == 2
    assert "no pictures in the folder" in result.stderr


def test_pictures_are_no_input(run: Run, gallery: Path, policy: Path) -> None:
    result = run("check", gallery, "--stage", "input", "--policy", policy)

    assert result.exit_code == 2
    assert "pictures are judged at the stage output" in result.stderr


def test_debug_shows_where_an_error_came_from(run: Run) -> None:
    result = run("--debug", "check", "x", "--policy", "nix.yaml")

    assert isinstance(result.exception, FileNotFoundError)


# --- the shipped model ----------------------------------------------------------------------------


def test_the_standard_preset_lets_a_harmless_text_pass(run: Run) -> None:
    try:
        resolve("text-guard-s")
    except PackNotFound:
        pytest.skip("the model pack text-guard-s is not in this tree")

    assert run("check", "How do I sharpen a kitchen knife?", "--json").exit_code == 0
