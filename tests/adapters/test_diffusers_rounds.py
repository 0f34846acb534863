"""A picture that is flagged is made again, alone, with what belongs to its row."""

from __future__ import annotations

import pytest
from PIL import Image

from safeguard.policy import OutputRules, Rule, Rules
from safeguard.testing import SwapRefiner
from safeguard.types import Action

pytest.importorskip("diffusers")
import torch

from tests.adapters.painter import guarded, image_rules


def test_regenerated_picture_is_drawn_anew_for_its_row_alone() -> None:
    pipe = guarded(output=image_rules(Action.REGENERATE), max_rounds=20)
    # the first draw of seed 0 is 0.4963 and of seed 1 0.7576, which is too bright; its next one is 0.2793
    generators = [torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)]
    out = pipe(
        prompt=["dice", "dice"], generator=generators, latents=torch.zeros(2, 4, 8, 8), output_type="np"
    )
    assert out.images[:, 0, 0, 0].tolist() == pytest.approx([0.4963, 0.2793], abs=1e-4)
    assert [r.rounds for r in out.safety] == [0, 1]
    assert pipe.calls[1]["latents"] is None
    assert pipe.calls[1]["generator"] is generators[1]
    assert out.sounds.tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]  # that of the withheld first picture


def test_regeneration_narrows_all_that_is_given_per_row() -> None:
    pipe = guarded(output=image_rules(Action.REGENERATE), max_rounds=1, on_block="replace")
    pictures = torch.zeros(2, 3, 8, 8)
    pictures[1] = 1
    pipe(pictures, ["grey", "white"], ["a", "b"], "none", 2, masks=torch.zeros(5, 4))
    again = pipe.calls[1]
    assert (again["prompt"], again["prompt_2"], again["negative_prompt"]) == (["white"], ["b"], "none")
    assert again["num_images_per_prompt"] == 1
    assert again["image"].shape == (1, 3, 8, 8)
    assert again["image"].max() == 1
    assert again["kwargs"]["masks"].shape == (5, 4)


def test_regeneration_narrows_embeddings_and_lists_of_pictures() -> None:
    pipe = guarded(
        output=image_rules(Action.REGENERATE), max_rounds=1, unseen_input="allow", on_block="replace"
    )
    pictures = [Image.new("L", (8, 8), shade) for shade in (0, 255)]
    masks, adapters = torch.tensor([[0.0], [1.0]]), [torch.zeros(2, 1)] * 2
    pipe(
        pictures,
        ["grey", "white"],
        prompt_embeds=torch.tensor([[0.0], [1.0]]),
        prompt_attention_mask=masks,
        ip_adapter_image_embeds=adapters,
        sigmas=[1.0, 0.5],
    )
    again = pipe.calls[1]
    assert again["image"] == pictures[1:]
    assert again["prompt_embeds"].tolist() == [[1.0]]
    assert again["kwargs"]["prompt_attention_mask"].tolist() == [[1.0]]
    assert again["kwargs"]["ip_adapter_image_embeds"] is adapters  # one for each adapter
    assert again["kwargs"]["sigmas"] == [1.0, 0.5]


def test_pictures_that_go_to_one_prompt_are_not_narrowed() -> None:
    pipe = guarded(output=image_rules(Action.REGENERATE), max_rounds=1, on_block="replace")
    pictures = [Image.new("L", (8, 8))] * 2
    pipe(pictures, "white", num_images_per_prompt=2)
    assert pipe.calls[1]["image"] is pictures


def test_picture_refined_until_it_is_safe() -> None:
    rules = OutputRules(image=Rules(categories={"bright": Rule(action=Action.REFINE)}))
    pipe = guarded(refiner=SwapRefiner({"white": "grey"}), output=rules)
    out = pipe(prompt=["white", "grey"], output_type="np")
    assert out.images[:, 0, 0, 0].tolist() == [0.25, 0.25]
    assert out.safety[0].revised_prompt == "grey"
