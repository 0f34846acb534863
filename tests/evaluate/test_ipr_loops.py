from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from safeguard.errors import RefinerError
from safeguard.evaluate.ipr_loops import Rounds, guarded, published
from safeguard.guards import Guard
from safeguard.policy import OutputRules, Policy, Rules
from safeguard.testing import SwapRefiner, WordCheck
from safeguard.types import Action, RefineRequest, Scores
from tests.evaluate.tiny_diffusion import draw


class RedCheck:
    """Scores a picture by its red channel, 0 to 1."""

    modality = "image"
    labels = ("red",)

    def __init__(self, name: str = "reds") -> None:
        self.name = name

    def __call__(self, batch: Sequence[Any], /) -> list[Scores]:
        return [{"red": image.getpixel((0, 0))[0] / 255} for image in batch]


class TurnRefiner:
    """Gives the texts in turn, one for each round."""

    name = "turns"

    def __init__(self, *texts: str) -> None:
        self._texts = texts

    def __call__(self, requests: Sequence[RefineRequest], /) -> list[str]:
        return [self._texts[min(r.round, len(self._texts)) - 1] for r in requests]


def guard_of(refiner: Any, *, rounds: int = 3, **parts: Any) -> Guard:
    image = Rules(action=Action.REFINE, threshold=0.5)
    policy = Policy(output=OutputRules(image=image), max_rounds=rounds, **parts)
    return Guard(outputs=[RedCheck()], refiner=refiner, policy=policy)


def test_a_flagged_picture_is_drawn_again_from_the_refined_prompt() -> None:
    (stream,) = guarded(guard_of(SwapRefiner({"knife": "cup"})), Rounds(draw, [7]), "a knife")
    assert stream.texts == ["a knife", "a cup", "a cup", "a cup"]
    assert stream.drawn == [True, True, False, False]
    assert stream.bare is stream.images[0]
    assert stream.images[1].getpixel((0, 0))[2] == 220  # blue, as cups are
    assert stream.images[1] is stream.images[3]
    assert stream.action is Action.REFINE


def test_a_picture_that_passes_is_left_alone() -> None:
    streams = guarded(guard_of(SwapRefiner({"cup": "tree"})), Rounds(draw, [7, 8]), "a cup")
    assert [s.drawn for s in streams] == [[True, False, False, False]] * 2
    assert [s.action for s in streams] == [Action.ALLOW] * 2


def test_what_is_still_flagged_after_the_last_round_is_withheld() -> None:
    (stream,) = guarded(guard_of(SwapRefiner({}), rounds=2), Rounds(draw, [7]), "a knife")
    assert stream.drawn == [True, True, True]  # nothing new to say, so each round has a new seed only
    assert stream.action is Action.BLOCK
    assert stream.images[-1] is not None


def test_other_noise_each_round_unless_it_is_to_be_the_same() -> None:
    guard = guard_of(SwapRefiner({}), rounds=1)
    (fresh,) = guarded(guard, Rounds(draw, [7]), "a knife")
    (same,) = guarded(guard, Rounds(draw, [7], fresh=False), "a knife")
    assert [i.getpixel((0, 0))[1] for i in same.images] == [7, 7]
    assert [i.getpixel((0, 0))[1] for i in fresh.images] == [7, (7 + 1_000_003) % 50]


def test_a_prompt_that_is_refused_draws_nothing_but_the_bare_picture() -> None:
    guard = guard_of(SwapRefiner({}))
    guard = Guard([WordCheck("knife")], guard.outputs, SwapRefiner({}), guard.policy)
    (stream,) = guarded(guard, Rounds(draw, [7]), "a knife")
    assert stream.bare.getpixel((0, 0))[0] == 220
    assert stream.images == [None] * 4
    assert stream.action is Action.BLOCK


def test_published_loop_ends_a_stream_at_keep_and_judges_nothing() -> None:
    refiner = TurnRefiner("a fork", "a knife", "a tree")  # the original prompt again means keep
    (stream,) = published(refiner, Rounds(draw, [7]), "a knife", 3)
    assert stream.texts == ["a knife", "a fork", "a fork", "a fork"]
    assert stream.drawn == [True, True, False, False]
    assert stream.action is Action.ALLOW


def test_published_loop_gives_the_refiner_the_original_and_the_latest_picture() -> None:
    refiner = SwapRefiner({"knife": "fork"})
    streams = published(refiner, Rounds(draw, [7]), "a knife", 2)
    assert [r.prompt for r in refiner.requests] == ["a knife", "a knife"]
    assert [r.round for r in refiner.requests] == [1, 2]
    assert refiner.requests[1].result is streams[0].images[1]


def test_streams_of_one_prompt_go_their_own_ways() -> None:
    class Half:
        name = "half"

        def __call__(self, requests: Sequence[RefineRequest], /) -> list[str]:
            return ["a cup" if r.result.getpixel((0, 0))[1] == 7 else r.prompt for r in requests]

    one, other = published(Half(), Rounds(draw, [7, 8], fresh=False), "a knife", 1)
    assert (one.texts[-1], other.texts[-1]) == ("a cup", "a knife")
    assert (one.drawn[-1], other.drawn[-1]) == (True, False)


def test_a_refiner_that_gives_another_number_of_texts_is_an_error() -> None:
    class Wrong:
        name = "wrong"

        def __call__(self, requests: Sequence[RefineRequest], /) -> list[str]:
            return []

    with pytest.raises(RefinerError, match="refiner 'wrong' gave 0 texts for 1"):
        published(Wrong(), Rounds(draw, [7]), "a knife", 1)


def test_a_draw_that_gives_another_number_is_an_error() -> None:
    with pytest.raises(ValueError, match="draw must give 2 pictures for one prompt"):
        Rounds(lambda prompts, seeds: [[None]], [1, 2]).all("a cup")


def test_no_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="a loop needs at least one seed"):
        Rounds(draw, [])
