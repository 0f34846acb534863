from __future__ import annotations

import numpy as np
import pytest

from safeguard.demo.captions import CaptionIndex, stem, terms

CAPTIONS = ["cat", "red car", "kitchen knife", "hot dog", "dog", "cigarette"]
KEYWORDS = ["pet", "vehicle", "blade", "sausage", "pet", "smoking"]


def named(prompt: str, negative: str = "") -> list[str]:
    index = CaptionIndex(CAPTIONS, KEYWORDS)
    return [CAPTIONS[c.best] for c in index.concepts(prompt, negative)]


def test_a_thing_is_found_by_its_caption() -> None:
    assert named("a cat") == ["cat"]


def test_a_thing_is_found_by_a_keyword_in_another_form() -> None:
    assert named("he smokes") == ["cigarette"]  # smokes and smoking have the stem smok


def test_things_come_in_the_order_of_the_prompt() -> None:
    assert named("a knife next to a cat") == ["kitchen knife", "cat"]


def test_two_words_of_one_caption_are_one_thing() -> None:
    assert named("a hot dog") == ["hot dog"]


def test_a_colour_alone_is_no_thing() -> None:
    assert named("a cat covered in red paint") == ["cat"]


def test_a_prompt_of_unknown_words_leaves_every_picture_as_likely() -> None:
    (concept,) = CaptionIndex(CAPTIONS, KEYWORDS).concepts("xyzzy")

    assert np.exp(concept.log_prior) == pytest.approx([1 / 6] * 6)


def test_without_guidance_the_prompt_is_ignored() -> None:
    (concept,) = CaptionIndex(CAPTIONS, KEYWORDS).concepts("a cat", guidance=0)

    assert np.exp(concept.log_prior) == pytest.approx([1 / 6] * 6)


def test_what_the_negative_prompt_names_is_left_out() -> None:
    assert named("a cat and a dog", negative="dog") == ["cat"]


def test_at_most_four_things_are_kept() -> None:
    assert len(named("cat, car, knife, dog and cigarette")) == 4


def test_probabilities_sum_to_one() -> None:
    (concept,) = CaptionIndex(CAPTIONS, KEYWORDS).concepts("a pet")

    assert np.exp(concept.log_prior).sum() == pytest.approx(1)


def test_little_words_and_signs_are_no_terms() -> None:
    assert terms("A cat, with_the  DOGS!") == ["cat", "dog"]


@pytest.mark.parametrize(
    ("word", "expected"),
    [("women", "woman"), ("knives", "knif"), ("running", "run"), ("berries", "berry"), ("glass", "glass")],
)
def test_forms_of_a_word_share_a_stem(word: str, expected: str) -> None:
    assert stem(word) == expected


def test_captions_without_keywords_for_each_are_refused() -> None:
    with pytest.raises(ValueError, match="keywords for each of one or more captions, got 2 and 1"):
        CaptionIndex(["a", "b"], ["c"])
