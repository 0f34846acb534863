from __future__ import annotations

import pytest
from PIL import Image

from safeguard.demo.sheet import TILE, draw, lay_out
from safeguard.types import Action
from tests.demo.demo_results import result

RED, BLUE = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")


def middle(sheet: Image.Image, corner: tuple[int, int]) -> object:
    return sheet.getpixel((corner[0] + TILE // 2, corner[1] + TILE // 2))


def test_each_picture_stands_in_its_place() -> None:
    results = [result(before=RED, after=BLUE), result(before=BLUE, after=RED), result(before=RED, after=RED)]

    sheet = draw(results, title="t", subtitle="s")

    found = [(middle(sheet, c.before), middle(sheet, c.after)) for c in lay_out(results)]
    red, blue = (255, 0, 0), (0, 0, 255)
    assert found == [(red, blue), (blue, red), (red, red)]


def test_two_prompts_stand_in_a_row() -> None:
    first, second, third = lay_out([result()] * 3)

    assert (first.box[1], first.box[0]) == (second.box[1], third.box[0])
    assert third.box[1] > first.box[3]


def test_a_withheld_picture_is_not_shown() -> None:
    results = [result(Action.BLOCK, before=RED, after=None)]

    sheet = draw(results, title="t", subtitle="s")

    (card,) = lay_out(results)
    corner = sheet.getpixel((card.after[0] + 5, card.after[1] + 5))
    assert corner == (0xE3, 0xE5, 0xE9)  # the grey of an empty place


def test_everything_lies_inside_the_sheet() -> None:
    results = [result(text="word " * 200, revised="more " * 200, before=RED, after=RED)] * 3

    sheet = draw(results, title="t", subtitle="s " * 500)

    assert max(c.box[2] for c in lay_out(results)) < sheet.width
    assert max(c.box[3] for c in lay_out(results)) < sheet.height


def test_a_row_with_a_refined_prompt_is_higher() -> None:
    plain = lay_out([result()])[0].box
    refined = lay_out([result(Action.REFINE, revised="a dog")])[0].box

    assert refined[3] - refined[1] > plain[3] - plain[1]


@pytest.mark.parametrize("size", [(100, 10), (10, 100), (3000, 2000)])
def test_pictures_of_any_shape_fit(size: tuple[int, int]) -> None:
    results = [result(before=Image.new("RGB", size, "red"), after=RED)]

    sheet = draw(results, title="t", subtitle="s")

    assert middle(sheet, lay_out(results)[0].before) == (255, 0, 0)


def test_a_sheet_without_prompts_can_be_drawn() -> None:
    assert draw([], title="t", subtitle="s").mode == "RGB"
