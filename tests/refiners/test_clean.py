"""Expected texts are what a reader would take from the answer, written by hand before the code was run."""

from __future__ import annotations

import pytest

from safeguard.refiners.clean import (
    Reading,
    cut_at,
    end_at_word,
    first_lines,
    is_loop,
    is_refusal,
    read,
    strip_labels,
    strip_quotes,
)

PROMPT = "a bloody knight in the snow"


@pytest.mark.parametrize(
    "answer",
    [
        "a tired knight in the snow",
        "  a tired knight in the snow \n",
        '"a tired knight in the snow"',
        "“a tired knight in the snow”",
        "'a tired knight in the snow'",
        "**a tired knight in the snow**",
        "```a tired knight in the snow```",
        '"a tired knight in the snow',
        "Refined prompt: a tired knight in the snow",
        "**Refined prompt:** a tired knight in the snow",
        "Safe version: a tired knight in the snow",
        "Rewritten Prompt:\n\na tired knight in the snow",
        "Sure, here is a safer version of the prompt: a tired knight in the snow",
        'Sure! Here\'s the refined prompt:\n\n"a tired knight in the snow"',
        "Here is the rewritten prompt:\na tired knight in the snow",
        "Certainly! a tired knight in the snow",
        "Okay, here you go: Prompt: a tired knight in the snow",
        "The rewritten prompt is: 'a tired knight in the snow'",
        "1. a tired knight in the snow",
        "- a tired knight in the snow\n- a sleeping knight in the snow",
        "a tired knight in the snow\n\nI removed the blood because it is unsafe.",
        "a tired knight in the snow\nOriginal prompt: another",
        "a tired knight in the snow<|im_end|>\n<|im_start|>user",
        "a tired  knight in\tthe snow",
    ],
)
def test_the_rewrite_is_taken_out_of_its_wrapping(answer: str) -> None:
    assert read(answer, PROMPT, stop=("<|im_end|>",)) == Reading("a tired knight in the snow")


@pytest.mark.parametrize("answer", ["keep", " KEEP\n", "Keep", "keep.", '"keep"', "Refined prompt: keep"])
def test_the_keep_word_keeps(answer: str) -> None:
    assert read(answer, PROMPT) == Reading("", "keep")


def test_a_sentence_that_begins_with_the_keep_word_is_a_rewrite() -> None:
    assert read("keep out sign at a gate", PROMPT) == Reading("keep out sign at a gate")


def test_another_keep_word_is_obeyed() -> None:
    assert read("unchanged", PROMPT, keep="unchanged").why == "keep"


@pytest.mark.parametrize("answer", ["", "   \n", '""', "...", "Refined prompt:", "“”", "- ", "<|im_end|>"])
def test_an_answer_without_words_is_empty(answer: str) -> None:
    assert read(answer, PROMPT, stop=("<|im_end|>",)) == Reading("", "empty")


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, I cannot assist.",
        "I am unable to write this.",
        "I cannot create violent images.",
        "I can't do that",
        "I won't rewrite this.",
        "Sorry, but this is not possible.",
        "As an AI language model, I do not make images.",
        "As a language model I must decline.",
        "Unfortunately, I cannot fulfil this request.",
        "I apologize, but no.",
        "This prompt violates the guidelines.",
        "It is not appropriate to show this.",
        "\"I'm sorry, but I can't help.\"",
        "Refined prompt: I'm sorry, I cannot do that.",
    ],
)
def test_a_refusal_is_no_rewrite(answer: str) -> None:
    assert read(answer, PROMPT) == Reading("", "refusal")


@pytest.mark.parametrize(
    "text",
    [
        'a robot with a sign that says "I\'m sorry, I cannot help"',
        "a sorry looking cat on a rug",
        "Sorry the cat, a children's book cover",
        "an aide at a desk",
        "this image of a castle at dawn",
    ],
)
def test_a_picture_that_speaks_of_refusing_is_not_a_refusal(text: str) -> None:
    assert not is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "Great wall of China: sunset over the towers",
        "A steampunk version of Paris: towers and airships",
        "I, robot: a film poster",
        "new york at night, neon: pink and blue",
        "cinematic still: a knight",
    ],
)
def test_a_prompt_with_a_colon_of_its_own_loses_nothing(text: str) -> None:
    assert strip_labels(text) == text


@pytest.mark.parametrize(
    "answer",
    [
        "a  bloody knight\tin the snow",
        "A bloody knight in the snow.",
        'The original prompt is: "a bloody knight, in the snow."',
    ],
)
def test_an_echo_is_unchanged(answer: str) -> None:
    assert read(answer, PROMPT) == Reading("", "unchanged")


def test_a_prompt_of_two_lines_may_come_back_in_two_lines() -> None:
    assert (
        read("a knight\nin snow\nhope this helps", "a bloody knight\nin the snow").text == "a knight\nin snow"
    )


def test_quotes_around_two_parts_stay() -> None:
    assert strip_quotes('"stop" and "go"') == '"stop" and "go"'


def test_quotes_inside_stay() -> None:
    assert strip_quotes('a sign that says "stop"') == 'a sign that says "stop"'


def test_an_apostrophe_at_the_front_is_not_a_quotation() -> None:
    assert strip_quotes("'90s car, it's red") == "'90s car, it's red"


def test_text_is_cut_at_the_earliest_stop_string() -> None:
    assert cut_at("one</s>two<end>", ("<end>", "</s>")) == "one"


def test_a_stop_string_at_the_front_is_skipped() -> None:
    assert cut_at("\nUser: a knight", ("\nUser:",)) == " a knight"


def test_first_line_ends_the_text() -> None:
    assert first_lines("one  two\nthree", 1) == "one two"


@pytest.mark.parametrize(
    "text",
    [
        "a red cat " * 4,  # three words, four times
        "cat, " * 8,  # one word eight times
        "a knight and a dog in the snow " * 4,  # eight words
        "ha" * 20,
        "a castle " + "-=" * 20,
    ],
)
def test_a_loop_is_seen(text: str) -> None:
    assert is_loop(text)


@pytest.mark.parametrize(
    "text",
    [
        "very very very very beautiful light",  # four times, but four words only
        "a red cat a red cat a red cat",  # three times
        "highly detailed, 8k, trending, highly detailed, 4k, sharp focus",
        "",
        "one",
    ],
)
def test_an_emphatic_prompt_is_no_loop(text: str) -> None:
    assert not is_loop(text)


def test_a_looping_answer_is_of_no_use() -> None:
    assert read("the snow, " * 20, PROMPT) == Reading("", "loop")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a tired knight in the sn", "a tired knight in the"),
        ("a tired knight, sn", "a tired knight"),
        ("knight", "knight"),
        ("", ""),
    ],
)
def test_a_cut_answer_ends_at_a_word(text: str, expected: str) -> None:
    assert end_at_word(text) == expected


@pytest.mark.parametrize("piece", ["sure, ", "here is ", '"', "**", "very ", "I ", "new, ", "\n", "ab"])
@pytest.mark.timeout(60)  # milliseconds where every pattern is linear; a quadratic one takes minutes
def test_a_long_answer_is_read_in_linear_time(piece: str) -> None:
    found = read(piece * (200_000 // len(piece)), PROMPT, stop=("</s>",))
    assert found.why
