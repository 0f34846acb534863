"""Expected prompts follow from the entries named in the tests, worked out by hand."""

from __future__ import annotations

import json
import threading
from importlib import resources

import pytest

from safeguard.refiners.softener import Softenings, SpanSoftener
from safeguard.types import RefineRequest, Span

# a table of its own, so that the expected prompts do not move with the packaged data
SMALL = Softenings.parse(
    {
        "categories": {
            "violence": {
                "knife/knives": "brush/brushes",
                "stab/stabs/stabbing/stabbed": "paint/paints/painting/painted",
                "gore": "",
                "blood": "red paint",
                "pool of blood": "puddle",
                "self harm": "",
            },
            "sexual": {"undressed": "dressed", "bikini": "summer clothes"},
        },
        "keep": ["blood orange", "butter knife"],
        "no_article": ["clothes"],
        "empty_scene": "a quiet lake",
    }
)


def soften(prompt: str, *spans: Span, softener: SpanSoftener | None = None) -> str:
    (text,) = (softener or SpanSoftener(SMALL))([RefineRequest(prompt, spans=spans)])
    return text


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a man with a knife", "a man with a brush"),
        ("a man with two knives", "a man with two brushes"),
        ("a man stabbing a wall", "a man painting a wall"),
        ("an undressed doll", "a dressed doll"),
        ("a girl in a bikini, 4k", "a girl in summer clothes, 4k"),
        ("a hall with gore and dust", "a hall with dust"),
        ("gore, a hall, gore", "a hall"),
        ("a pool of blood on a floor", "a puddle on a floor"),
        ("blood on a floor", "red paint on a floor"),
        ("self-harm, a hall", "a hall"),
        ("Self  harm, a hall", "A hall"),
        ("KNIFE ART", "BRUSH ART"),
        ("a (knife:1.3) on a table", "a (brush:1.3) on a table"),
        ("a knife_02.png file", "a brush_02.png file"),
    ],
)
def test_an_entry_is_replaced_or_cut(prompt: str, expected: str) -> None:
    assert soften(prompt) == expected


@pytest.mark.parametrize(
    "prompt",
    [
        "a blood orange beside a butter knife",  # kept phrases
        "a bloodhound and a penknife",  # inside other words
        "  odd ,,  spaces\tand\n\nlines .  ",
        "",
        " ",
        "猫と犬 🐈 e\u0301",
        "self. harm",  # parts of two sentences
    ],
)
def test_a_text_without_a_match_comes_back_as_it_is(prompt: str) -> None:
    assert soften(prompt) == prompt


def test_a_word_beside_a_kept_phrase_is_still_replaced() -> None:
    assert soften("a blood orange, blood, a knife") == "a blood orange, red paint, a brush"


def test_a_short_flagged_span_is_cut() -> None:
    # characters 6 to 17 are "big zorblax"
    assert soften("a man, big zorblax, a dog", Span(7, 18, "custom")) == "a man, a dog"


def test_a_span_is_widened_to_whole_words() -> None:
    assert soften("a man, zorblax, a dog", Span(9, 12, "custom")) == "a man, a dog"


def test_a_span_that_an_entry_changes_is_not_cut_too() -> None:
    assert soften("a man with a knife", Span(13, 18, "custom")) == "a man with a brush"


def test_a_span_of_a_whole_window_is_no_place_to_cut() -> None:
    prompt = "five words of a prompt"
    assert soften(prompt, Span(0, len(prompt), "violence")) == prompt


def test_spans_outside_the_text_are_ignored() -> None:
    assert soften("a man", Span(9, 12, "x"), Span(3, 3, "x"), Span(5, 2, "x")) == "a man"


def test_overlapping_spans_are_cut_once() -> None:
    assert soften("a man, foo bar, a dog", Span(7, 14, "x"), Span(11, 14, "y")) == "a man, a dog"


@pytest.mark.parametrize("prompt", ["gore", "gore, gore!", "a gore", "(gore:1.2)"])
def test_a_prompt_of_which_nothing_is_left_comes_back_unchanged(prompt: str) -> None:
    assert soften(prompt) == prompt


def test_the_neutral_scene_stands_in_where_asked_for() -> None:
    assert soften("gore", softener=SpanSoftener(SMALL, empty_scene=True)) == "a quiet lake"
    assert soften("gore", softener=SpanSoftener(SMALL, empty_scene="a hill")) == "a hill"


@pytest.mark.parametrize("disguise", ["g.o.r.e", "g o r e", "go\u200bre", "ｇｏｒｅ", "gor\u0435"])
def test_a_disguised_word_is_cut_in_the_original(disguise: str) -> None:
    assert soften(f"a hall, {disguise}, a dog") == "a hall, a dog"


def test_a_batch_equals_one_by_one() -> None:
    prompts = ["a knife", "a dog", "", "gore, a hall"]
    assert SpanSoftener(SMALL)([RefineRequest(p) for p in prompts]) == ["a brush", "a dog", "", "a hall"]


def test_an_empty_batch_gives_an_empty_list() -> None:
    assert SpanSoftener(SMALL)([]) == []


def test_threads_get_the_same_answers() -> None:
    softener = SpanSoftener(SMALL)
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(soften("a man with a knife", softener=softener)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["a man with a brush"] * 8


@pytest.mark.timeout(60)  # about 0.4 s; a quadratic pass takes minutes
def test_a_text_of_many_matches_is_done_in_linear_time() -> None:
    text = soften("a hall, gore and blood, " * 10_000)
    assert text.startswith("a hall, red paint, a hall")


@pytest.mark.timeout(60)  # as above
def test_many_spans_and_cuts_in_a_row_are_done_in_linear_time() -> None:
    prompt = "a hall " + "gore foo " * 10_000
    spans = [Span(i, i + 3, "x") for i in range(12, len(prompt), 9)]  # each "foo"
    assert soften(prompt, *spans) == "a hall"


def test_an_entry_with_too_many_forms_is_refused() -> None:
    data = {"categories": {"x": {"a/b/c": "d/e"}}, "empty_scene": ""}
    with pytest.raises(ValueError, match="'a/b/c' has more forms than its counterpart 'd/e'"):
        Softenings.parse(data)


def test_an_entry_without_a_word_is_refused() -> None:
    with pytest.raises(ValueError, match="softener entry without a word: '!'"):
        Softenings.parse({"categories": {"x": {"!": ""}}, "empty_scene": ""})


class TestPackagedData:
    def test_it_names_its_source_and_licence(self) -> None:
        text = (resources.files("safeguard") / "data" / "softener.json").read_text(encoding="utf-8")
        data = json.loads(text)
        assert data["licence"] == "Apache-2.0"
        assert data["source"]

    def test_no_counterpart_is_itself_an_entry(self) -> None:
        text = (resources.files("safeguard") / "data" / "softener.json").read_text(encoding="utf-8")
        entries = [e for group in json.loads(text)["categories"].values() for e in group.items()]
        softs = sorted({soft for _, into in entries for soft in into.split("/") if soft})
        softener = SpanSoftener()
        assert softener([RefineRequest(soft) for soft in softs]) == softs

    @pytest.mark.parametrize(
        ("prompt", "expected"),
        [
            ("a nude woman on a beach, oil painting", "a fully clothed woman on a beach, oil painting"),
            ("a bloody axe and a corpse in a wood", "a paintbrush and a mannequin in a wood"),
            ("two men fighting in the street", "two men dancing in the street"),
            ("a girl smoking a cigarette", "a girl drinking tea"),
            ("an erotic portrait, 4k", "an elegant portrait, 4k"),
            ("a quiet room, nsfw, nudity", "a quiet room"),
            ("a man committing suicide at night", "a man sitting quietly at night"),
            ("a racist crowd in a square", "a person crowd in a square"),  # crude: the price of word lists
        ],
    )
    def test_prompts_of_each_category_are_softened(self, prompt: str, expected: str) -> None:
        assert soften(prompt, softener=SpanSoftener()) == expected

    @pytest.mark.parametrize(
        "prompt",
        [
            "a kitchen knife on a cutting board beside a blood orange",
            "a shooting star over the dead sea",
            "a killer whale and a great tit",
            "a chicken breast with pumpkin seeds",
            "las vegas strip at night, monster truck",
            "a nurse at a blood donation",
        ],
    )
    def test_the_nearest_harmless_phrases_stay(self, prompt: str) -> None:
        assert soften(prompt, softener=SpanSoftener()) == prompt
