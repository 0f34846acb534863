from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("diffusers")

from safeguard import Guard, Policy
from safeguard.demo import pictures
from safeguard.demo.emoji_pipeline import EmojiPipeline
from safeguard.demo.results import Prompt, Result
from safeguard.policy import InputRules, Rules
from safeguard.testing import SwapRefiner, WordCheck
from safeguard.types import Action


def painted(prompt: str, refiner: SwapRefiner | None = None) -> Result:
    policy = Policy(input=InputRules(t2i=Rules(action=Action.REFINE)))
    guard = Guard(inputs=[WordCheck("knife")], refiner=refiner, policy=policy)
    (found,) = pictures.paint(EmojiPipeline.embedded(), guard, [Prompt(prompt, False, seed=3)])
    return found


def test_a_harmless_prompt_gives_the_same_picture_with_and_without() -> None:
    found = painted("a red car")

    assert found.report.action is Action.ALLOW
    assert np.array_equal(np.asarray(found.before), np.asarray(found.after))


def test_a_refined_prompt_gives_the_picture_of_the_new_prompt() -> None:
    found = painted("a knife", SwapRefiner({"knife": "red car"}))

    assert found.report.revised_prompt == "a red car"
    assert np.array_equal(np.asarray(found.after), np.asarray(painted("a red car").before))


def test_a_prompt_that_cannot_be_refined_has_no_picture_after() -> None:
    found = painted("a knife")

    assert found.report.action is Action.BLOCK
    assert (found.before is not None, found.after) == (True, None)


def test_the_embedded_pipeline_is_called_what_it_is() -> None:
    pipe, title = pictures.load(None)

    assert type(pipe).__name__ == "EmojiPipeline"
    assert title == "closed-form emoji denoiser, not a trained text-to-image model"


def test_a_pipeline_without_pictures_is_refused() -> None:
    def pipe(prompt: str, generator: Any) -> Any:
        return SimpleNamespace(audios=[])

    with pytest.raises(TypeError, match="name a text-to-image pipeline"):
        list(pictures.paint(pipe, Guard(), [Prompt("a cat", False)]))
