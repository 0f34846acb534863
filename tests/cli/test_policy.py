from __future__ import annotations

import json
from pathlib import Path

import pytest

from safeguard.cli.judge import policy_of, without_refiner
from safeguard.errors import PolicyError
from safeguard.policy import PRESETS, Policy
from tests.cli.conftest import Run


@pytest.mark.parametrize("form", ["yaml", "toml", "json"])
@pytest.mark.parametrize("name", PRESETS)
def test_a_shown_preset_reads_back_as_the_same_policy(run: Run, tmp_path: Path, form: str, name: str) -> None:
    path = tmp_path / f"shown.{form}"
    path.write_text(run("policy", "show", name, "--format", form).stdout, encoding="utf-8")

    assert Policy.from_file(path) == Policy.preset(name)


def test_full_shows_the_defaults_as_well(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "shown.toml"
    path.write_text(run("policy", "show", "standard", "--full", "--format", "toml").stdout, encoding="utf-8")

    assert "max_rounds = 3" in path.read_text(encoding="utf-8")
    assert Policy.from_file(path) == Policy.preset("standard")


def test_a_file_is_shown_in_another_form(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nmax_rounds: 1\n", encoding="utf-8")

    assert json.loads(run("policy", "show", path, "--format", "json").stdout) == {
        "name": "mine",
        "max_rounds": 1,
    }


def test_the_schema_of_policies_is_printed(run: Run) -> None:
    schema = json.loads(run("policy", "schema").stdout)

    assert schema["title"] == "Policy"
    assert "operating_point" in schema["properties"]


def test_the_schema_of_reports_is_printed(run: Run) -> None:
    schema = json.loads(run("policy", "schema", "--report").stdout)

    assert schema["title"] == "Report"
    assert {"action", "risk", "verdicts"} <= set(schema["properties"])


def test_a_valid_file_is_called_valid(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\nmode = "monitor"\n', encoding="utf-8")
    result = run("policy", "check", path)

    assert result.exit_code == 0
    assert result.stdout == f"valid: policy mine {Policy.from_file(path).digest[:12]}, mode monitor\n"


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("a.yaml", "on_eror: block\n", "a.yaml: unknown key 'on_eror'; did you mean 'on_error'"),
        ("a.json", "{", "a.json is not valid JSON"),
        ("a.txt", "", "policy files end in .yaml, .yml, .toml or .json, got '.txt'"),
    ],
)
def test_an_invalid_file_exits_with_2(run: Run, tmp_path: Path, name: str, text: str, why: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    result = run("policy", "check", tmp_path / name)

    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {why}")
    assert result.stderr.count("\n") == 1


def test_the_same_policy_does_not_differ(run: Run) -> None:
    result = run("policy", "diff", "standard", "standard")

    assert result.exit_code == 0
    assert result.stdout == ""


def test_each_difference_is_a_line_with_both_values(run: Run, tmp_path: Path) -> None:
    old, new = tmp_path / "old.yaml", tmp_path / "new.yaml"
    old.write_text("name: x\nmax_rounds: 1\n", encoding="utf-8")
    rule = "output: {text: {categories: {toxic: {threshold: 0.4}}}}"
    new.write_text(f"name: x\nmax_rounds: 2\n{rule}\n", encoding="utf-8")
    result = run("policy", "diff", old, new)

    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        "max_rounds: 1 -> 2",
        "output.text.categories.toxic.threshold: absent -> 0.4",
    ]


def test_a_policy_without_refiner_has_a_digest_of_its_own() -> None:
    policy = Policy.preset("standard")
    digest = policy.digest

    assert without_refiner(policy).refiner is None
    assert without_refiner(policy).digest != digest


def test_a_name_that_is_no_preset_is_a_file() -> None:
    with pytest.raises(PolicyError, match="policy files end in"):
        policy_of("standart")
