from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from safeguard.errors import PackError
from safeguard.refiners.template import RefinerTemplate


def test_the_prompt_is_put_in_as_data() -> None:
    template = RefinerTemplate(version="1", user="Prompt: {prompt}!")
    assert template.fill("{prompt} {0} {system}") == "Prompt: {prompt} {0} {system}!"


def test_messages_have_a_system_turn_only_when_there_is_one() -> None:
    user = {"role": "user", "content": "a cat"}
    assert RefinerTemplate(version="1").messages("a cat") == [user]
    system = {"role": "system", "content": "Rewrite."}
    assert RefinerTemplate(version="1", system="Rewrite.").messages("a cat") == [system, user]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(0, 77), (38, 77), (40, 80), (64, 128), (1000, 128)],  # twice the prompt, 77 at least, 128 at most
)
def test_the_limit_grows_with_the_prompt(tokens: int, expected: int) -> None:
    assert RefinerTemplate(version="1").limit(tokens) == expected


@pytest.mark.parametrize("user", ["no place", "{prompt} {prompt}"])
def test_a_template_needs_one_place_for_the_prompt(user: str) -> None:
    with pytest.raises(ValidationError, match=r"must hold \{prompt\} exactly once"):
        RefinerTemplate(version="1", user=user)


def test_a_keep_word_that_could_never_match_is_refused() -> None:
    with pytest.raises(ValidationError, match="keep must be in lower case"):
        RefinerTemplate(version="1", keep="Keep")


def test_a_template_comes_back_from_its_file(tmp_path: Path) -> None:
    template = RefinerTemplate(version="7", system="Été", stop=("</s>",), length_factor=1.5)
    template.write(tmp_path / "refiner_template.json")
    assert RefinerTemplate.read(tmp_path / "refiner_template.json") == template


@pytest.mark.parametrize("text", ["{", "[]", '{"version": "1", "sytem": "x"}', "{}"])
def test_a_file_that_is_no_template_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "refiner_template.json"
    path.write_text(text)
    with pytest.raises(PackError, match=r"refiner_template.json is not a refiner template"):
        RefinerTemplate.read(path)


def test_the_packaged_template_is_valid_and_names_its_licence() -> None:
    template = RefinerTemplate.default()
    assert (template.licence, template.keep) == ("Apache-2.0", "keep")


def test_what_drew_the_picture_is_put_in_as_data_too() -> None:
    template = RefinerTemplate(version="1", user="{prompt} / {current}")
    assert template.fill("a {current}", "b {prompt}") == "a {current} / b {prompt}"
    assert template.fill("a") == "a / a"


def test_the_place_for_what_drew_the_picture_comes_once_at_most() -> None:
    with pytest.raises(ValueError, match=r"user may hold \{current\} once, got 2 times"):
        RefinerTemplate(version="1", user="{prompt} {current} {current}")
