"""Policies: valid or not there at all, the same in every file format, and clear about what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from safeguard import Action, Policy, PolicyError, UnknownName
from safeguard.policy import PRESETS, Rule, Rules, RuntimeRules

STANDARD = """
name: shop
input:
  t2i:
    action: refine
    ignore: ["llm*"]
    categories:
      t2i_prompt: {threshold: 0.7, action: block}
"""


@pytest.mark.parametrize("form", ["yaml", "toml", "json"])
@pytest.mark.parametrize("name", PRESETS)
def test_preset_survives_being_written_and_read(name: str, form: Literal["yaml", "toml", "json"]) -> None:
    policy = Policy.preset(name)
    assert Policy.from_text(policy.to_text(form), form) == policy


@pytest.mark.parametrize("ending", [".yaml", ".yml", ".toml", ".json"])
def test_file_ending_chooses_the_format(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"policy{ending}"
    policy = Policy.from_text(STANDARD, "yaml")
    policy.to_file(path)
    assert Policy.from_file(path) == policy


def test_equal_policies_have_equal_digests() -> None:
    assert Policy.from_text(STANDARD, "yaml").digest == Policy.from_text(STANDARD, "yaml").digest


def test_another_threshold_gives_another_digest() -> None:
    assert (
        Policy.from_text(STANDARD, "yaml").digest
        != Policy.from_text(STANDARD.replace("0.7", "0.8"), "yaml").digest
    )


def test_rule_of_a_category_beats_the_calibrated_threshold() -> None:
    rules = Policy.from_text(STANDARD, "yaml").input.t2i
    assert rules.threshold_of("t2i_prompt", {"t2i_prompt": 0.2}) == 0.7


def test_calibrated_threshold_beats_that_of_the_surface() -> None:
    assert Rules(threshold=0.5).threshold_of("toxicity", {"toxicity": 0.2}) == 0.2


def test_ignored_category_has_no_threshold() -> None:
    assert Rules(ignore=("llm*",)).threshold_of("llm_request", {}) is None


def test_category_with_a_rule_is_judged_though_a_pattern_ignores_it() -> None:
    rules = Rules(ignore=("llm*",), categories={"llm_request": Rule(threshold=0.9)})
    assert rules.threshold_of("llm_request", {}) == 0.9


def test_action_of_a_category_beats_that_of_the_surface() -> None:
    assert Policy.from_text(STANDARD, "yaml").input.t2i.action_of("t2i_prompt") is Action.BLOCK


def test_unknown_key_is_refused_and_the_nearest_one_named() -> None:
    with pytest.raises(PolicyError, match=r"unknown key 'treshold' in input.t2i; did you mean 'threshold'"):
        Policy.from_text("input: {t2i: {treshold: 0.3}}", "yaml")


def test_unknown_key_inside_a_category_names_the_nearest_one() -> None:
    with pytest.raises(PolicyError, match=r"unknown key 'actoin' .*did you mean 'action'"):
        Policy.from_text("output: {text: {categories: {toxic: {actoin: block}}}}", "yaml")


def test_threshold_out_of_range_says_where_and_what_was_given() -> None:
    with pytest.raises(PolicyError, match=r"output.image.threshold: .*less than or equal to 1, got 1.5"):
        Policy.from_text("output: {image: {threshold: 1.5}}", "yaml")


def test_nan_threshold_is_refused() -> None:
    with pytest.raises(PolicyError, match=r"output.image.threshold: .*finite"):
        Policy.from_text("output: {image: {threshold: .nan}}", "yaml")


def test_action_that_cannot_be_carried_out_is_refused() -> None:
    with pytest.raises(
        PolicyError, match=r"input.t2i.action: 'regenerate' cannot be done here; use refine or block"
    ):
        Policy.from_text("input: {t2i: {action: regenerate}}", "yaml")


def test_redacting_a_picture_is_refused() -> None:
    with pytest.raises(
        PolicyError, match=r"output.image.categories.gore.action: 'redact' cannot be done here"
    ):
        Policy.from_text("output: {image: {categories: {gore: {action: redact}}}}", "yaml")


def test_key_given_twice_is_refused() -> None:
    with pytest.raises(PolicyError, match="key 'name' twice"):
        Policy.from_text("name: a\nname: b\n", "yaml")


def test_key_given_twice_in_json_is_refused() -> None:
    with pytest.raises(PolicyError, match="key 'name' twice"):
        Policy.from_text('{"name": "a", "name": "b"}', "json")


def test_yaml_alias_is_refused() -> None:
    with pytest.raises(PolicyError, match="aliases are not allowed"):
        Policy.from_text("name: &a shop\nrefiner: *a\n", "yaml")


def test_yaml_that_builds_python_objects_is_refused() -> None:
    with pytest.raises(PolicyError, match="not valid YAML"):
        Policy.from_text("name: !!python/object/apply:os.getcwd []\n", "yaml")


def test_broken_toml_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "shop.toml"
    path.write_text("name = ")
    with pytest.raises(PolicyError, match=r"shop.toml is not valid TOML"):
        Policy.from_file(path)


def test_other_file_endings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"policy files end in .yaml, .yml, .toml or .json, got '.ini'"):
        Policy.from_file(tmp_path / "policy.ini")


def test_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_bytes(b"name: \xff\xfe")
    with pytest.raises(PolicyError, match=r"policy.yaml is not UTF-8 text \(byte 6\)"):
        Policy.from_file(path)


def test_huge_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_bytes(b"#" * 1_000_001)
    with pytest.raises(PolicyError, match="larger than 1000000 bytes"):
        Policy.from_file(path)


def test_list_at_the_top_is_refused() -> None:
    with pytest.raises(PolicyError, match="must hold keys and values at its top, got list"):
        Policy.from_text("- name: a\n", "yaml")


def test_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(
        UnknownName, match="no preset named 'medium'; known: monitor, lenient, standard, strict"
    ):
        Policy.preset("medium")


def test_policy_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Policy().max_rounds = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    "text", ["input: {llm: {threshold: yes}}", "max_rounds: off", "check_timeout_s: true"]
)
def test_switches_are_not_taken_for_numbers(text: str) -> None:
    with pytest.raises(PolicyError, match="must not be true or false"):
        Policy.from_text(text, "yaml")


def test_probe_is_off_until_it_is_asked_for() -> None:
    assert Policy().probe.every == 0
    assert [Policy.preset(name).probe.every for name in PRESETS] == [0] * len(PRESETS)


def test_misspelt_probe_setting_is_refused() -> None:
    with pytest.raises(PolicyError, match="unknown key 'form_step' in probe; did you mean 'from_step'"):
        Policy.from_data({"probe": {"every": 5, "form_step": 3}})


@pytest.mark.parametrize(
    "probe",
    [{"every": -1}, {"from_step": 0}, {"threshold": 1.5}, {"preview": "rgb"}, {"unavailable": "ignore"}],
)
def test_probe_that_says_something_invalid_is_refused(probe: dict[str, object]) -> None:
    with pytest.raises(PolicyError, match=f"probe.{next(iter(probe))}"):
        Policy.from_data({"probe": probe})


def test_what_torch_is_told_is_what_differs_from_the_defaults() -> None:
    assert RuntimeRules().torch_options == {}
    assert RuntimeRules(torch_run="compiled").torch_options == {"torch_run": "compiled"}
    assert RuntimeRules(torch_run="cuda_graphs", torch_dtype="float16").torch_options == {
        "torch_run": "cuda_graphs",
        "torch_dtype": "float16",
    }


def test_unknown_way_for_torch_to_run_is_refused() -> None:
    with pytest.raises(PolicyError, match=r"runtime.torch_run"):
        Policy.from_data({"runtime": {"torch_run": "graphs"}})
