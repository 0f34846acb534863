from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from safeguard.train.refiner.picture_rewards import Drawings, ImageBuffer, Improvement, PictureReward, State
from safeguard.train.refiner.pictures import PictureModels, check_inappropriate, pipeline_draw
from safeguard.train.refiner.rewards import Attempt
from safeguard.train.refiner.rl import Compat
from safeguard.types import Finding
from tests.train.tiny_refiner import rl_config

ORIGINAL = "bad cat"
SHADES = {"bad cat": 200, "good cat": 50, "fine cat": 100}
"""Grey level of what each prompt draws; Q16's stand-in calls level 200 inappropriate by 200/250."""


class Painter:
    """Draws one grey picture per seed, the seed added to its level, and counts its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[str, ...], tuple[int, ...]]] = []

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[list[Any]]:
        self.calls.append((tuple(prompts), tuple(seeds)))
        return [[Image.new("L", (2, 2), SHADES[p] + seed) for seed in seeds] for p in prompts]


def level(image: Any) -> int:
    return int(image.getpixel((0, 0)))


def inappropriate(images: Sequence[Any]) -> list[float]:
    return [level(image) / 250 for image in images]


def alignment(images: Sequence[Any], texts: Sequence[str]) -> list[float]:
    """0.4 to the original, 0.2 to any other text."""
    return [0.4 if text == ORIGINAL else 0.2 for text in texts]


def worth(**options: Any) -> PictureReward:
    return PictureReward(inappropriate, alignment, **options)


def drawn(prompt: str, count: int = 1, why: Any = "") -> Attempt:
    images = Painter()([prompt], range(count))[0]
    return Attempt(ORIGINAL, prompt, why, tuple(images), tuple(range(count)))


def test_the_reward_is_five_times_safety_plus_capped_alignment() -> None:
    # 5 * (1 - 50/250) + min(0.4, 0.31)
    assert worth()([drawn("good cat")]) == [pytest.approx(4.31)]


def test_both_terms_are_means_over_the_pictures() -> None:
    # levels 50 and 51: mean risk 50.5 / 250 = 0.202
    assert worth()([drawn("good cat", 2)]) == [pytest.approx(5 * 0.798 + 0.31)]


def test_without_a_cap_alignment_counts_in_full_as_in_ipr() -> None:
    assert worth(cap=None)([drawn("good cat")]) == [pytest.approx(4.4)]


def test_alignment_to_the_refined_prompt_is_only_for_comparison_with_posi() -> None:
    assert worth(against="refined")([drawn("good cat")]) == [pytest.approx(4.2)]


def test_posi_cuts_the_refined_prompt_at_77_characters() -> None:
    seen: list[str] = []

    def align(images: Sequence[Any], texts: Sequence[str]) -> list[float]:
        seen.extend(texts)
        return [0.0] * len(texts)

    reward = PictureReward(inappropriate, align, against="refined")
    reward([Attempt("a", "b" * 100, "", (Image.new("L", (2, 2)),))])
    assert seen == ["b" * 77]


def test_a_picture_reward_wants_pictures() -> None:
    with pytest.raises(ValueError, match="draw the attempts first"):
        worth()([Attempt("a", "b")])


def test_a_risk_out_of_range_is_an_error() -> None:
    reward = PictureReward(lambda images: [float("nan")] * len(images), alignment)
    with pytest.raises(ValueError, match="inappropriate must give 1 probabilities"):
        reward([drawn("good cat")])


def test_equal_prompts_are_drawn_once() -> None:
    painter = Painter()
    attempts = [Attempt(ORIGINAL, "good cat"), Attempt(ORIGINAL, "good cat"), Attempt(ORIGINAL, "fine cat")]
    Drawings(painter, count=2)(attempts, 0)
    assert painter.calls == [(("good cat", "fine cat"), (0, 1))]


def test_nothing_is_drawn_for_an_unusable_answer() -> None:
    found = Drawings(Painter(), count=1)([Attempt(ORIGINAL, ORIGINAL, "loop")], 0)
    assert found[0].images == ()


def test_a_group_shares_its_noises_and_the_next_round_has_others() -> None:
    drawings = Drawings(Painter(), count=2, seed=10)
    assert (drawings.seeds(0), drawings.seeds(1)) == ((10, 11), (12, 13))


def test_fixed_seeds_are_the_same_in_every_round_as_in_posi() -> None:
    assert Drawings(Painter(), count=2, fixed=True).seeds(7) == (0, 1)


def test_a_pipeline_that_gives_too_few_pictures_is_an_error() -> None:
    with pytest.raises(ValueError, match="draw must give 2 images for each of 1 prompts"):
        Drawings(lambda prompts, seeds: [[1]], count=2)([Attempt("a", "b")], 0)


def test_there_must_be_a_picture() -> None:
    with pytest.raises(ValueError, match="count must be 1 or more, got 0"):
        Drawings(Painter(), count=0)


def improvement(**options: Any) -> Improvement:
    return Improvement(worth(), Drawings(Painter(), count=2), **options)


def test_a_rewrite_is_worth_what_it_gains_over_the_original() -> None:
    # before: levels 200, 201, mean risk 0.802; after: 50, 51, mean 0.202; alignment capped on both sides
    assert improvement()([drawn("good cat", 2)]) == [pytest.approx(5 * 0.6)]


def test_keeping_is_worth_a_fixed_amount() -> None:
    assert improvement()([drawn(ORIGINAL, 2, "keep")]) == [0.3]


def test_one_picture_as_baseline_is_only_for_comparison_with_ipr() -> None:
    # before: level 200 alone, risk 0.8; after: mean 0.202
    assert improvement(baseline="first")([drawn("good cat", 2)]) == [pytest.approx(5 * 0.598)]


def test_without_a_walk_the_state_stays_the_original() -> None:
    reward = improvement()
    reward([drawn("good cat", 2)])
    assert [state.prompt for state in reward.buffer.states(ORIGINAL)] == [ORIGINAL]


def test_with_a_walk_each_group_adds_one_rewrite_to_the_buffer() -> None:
    reward = improvement(walk=True)
    reward([drawn("good cat", 2), drawn(ORIGINAL, 2, "keep")])
    assert [state.prompt for state in reward.buffer.states(ORIGINAL)] == [ORIGINAL, "good cat"]


def test_a_group_that_only_keeps_adds_nothing() -> None:
    reward = improvement(walk=True)
    reward([drawn(ORIGINAL, 2, "keep")])
    assert len(reward.buffer.states(ORIGINAL)) == 1


def test_the_state_shown_is_the_state_that_is_paid_for() -> None:
    reward = improvement(walk=True)
    original, _ = reward.show(ORIGINAL)
    reward([replace(drawn("good cat", 2), state=original.number)])
    good = reward.buffer.states(ORIGINAL)[1]
    # from the picture of "good cat" (risk .202) the same rewrite gains nothing, from the original's 5 * .6
    attempt = drawn("good cat", 2)
    assert reward([replace(attempt, state=good.number)]) == [pytest.approx(0.0)]
    assert reward([replace(attempt, state=original.number)]) == [pytest.approx(5 * 0.6)]


def test_showing_a_state_again_draws_nothing_and_counts_no_visit() -> None:
    painter = Painter()
    reward = Improvement(worth(), Drawings(painter, count=2), walk=True)
    first = reward.show(ORIGINAL)
    calls = len(painter.calls)
    assert reward.show(ORIGINAL) == first
    assert len(painter.calls) == calls
    assert reward.buffer.to_dict()["visits"] == {}


def test_states_of_an_older_checkpoint_get_their_numbers() -> None:
    buffer = ImageBuffer()
    buffer.restore({"states": {"p": [["a", [0], 1.0, 1.0], ["b", [0], 1.0, 1.0]]}, "visits": {}})
    buffer.add("p", State("c", (0,), 1.0, 1.0))
    assert [state.number for state in buffer.states("p")] == [0, 1, 2]


def test_the_state_is_drawn_uniformly_and_follows_from_the_seed() -> None:
    first, again = ImageBuffer(seed=3), ImageBuffer(seed=3)
    for buffer in (first, again):
        for name in "ab":
            buffer.add("p", State(name, (0,), 1.0, 1.0))
    picks = [first.pick("p").prompt for _ in range(200)]
    assert picks == [again.pick("p").prompt for _ in range(200)]
    assert 70 < picks.count("a") < 130


def test_a_full_buffer_keeps_the_original_and_the_newest() -> None:
    buffer = ImageBuffer(most=2)
    for name in "abc":
        buffer.add("p", State(name, (0,), 1.0, 1.0))
    assert [state.prompt for state in buffer.states("p")] == ["a", "c"]


def test_a_buffer_comes_back_from_json_as_it_was() -> None:
    buffer = ImageBuffer(seed=1)
    for name in "abc":
        buffer.add("p", State(name, (0, 1), 1.5, 1.0))
    buffer.pick("p")
    other = ImageBuffer(seed=1)
    other.restore(json.loads(json.dumps(buffer.to_dict())))
    assert other.states("p") == buffer.states("p")
    assert [other.pick("p") for _ in range(9)] == [buffer.pick("p") for _ in range(9)]


def test_a_buffer_has_room_for_one() -> None:
    with pytest.raises(ValueError, match="most must be 1 or more"):
        ImageBuffer(most=0)


def test_compat_switches_reach_drawings_and_reward() -> None:
    compat = Compat(fixed_seeds=True, refined_alignment=True, uncapped_alignment=True)
    models = PictureModels(Painter(), inappropriate, lambda images, texts: [0.5] * len(texts))
    drawings, reward = models.rewards(rl_config(compat=compat, images_per_prompt=1))
    assert drawings.seeds(5) == (0,)
    assert reward(drawings([Attempt(ORIGINAL, "good cat")], 0)) == [pytest.approx(4.5)]  # 5 * 0.8 + 0.5


def test_a_pipeline_gets_one_generator_per_picture_with_its_seed() -> None:
    class Pipe:
        """Gives each prompt with the seed of its generator, as a diffusers pipeline takes them."""

        def __call__(self, prompts: list[str], *, generator: list[Any], **options: Any) -> Any:
            assert options == {"num_inference_steps": 20, "guidance_scale": 7.0}
            self.images = [(p, g.initial_seed()) for p, g in zip(prompts, generator, strict=True)]
            return self

    made = pipeline_draw(Pipe(), batch_size=3)(["a", "b"], (5, 6))
    assert made == [[("a", 5), ("a", 6)], [("b", 5), ("b", 6)]]


def test_any_image_check_can_say_what_is_inappropriate() -> None:
    def check(images: Sequence[Any]) -> list[Any]:
        return [Finding({"inappropriate": 0.25}), {"inappropriate": 0.5}]

    assert check_inappropriate(check, "inappropriate")([None, None]) == [0.25, 0.5]
