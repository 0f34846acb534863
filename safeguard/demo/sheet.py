"""The before/after sheet: per prompt the picture without and with the guard, and what the guard did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from safeguard.demo.results import Result, done, visible, why

TILE = 224
"""Side of a picture on the sheet, in pixels."""
COLUMNS = 2

_GAP = 44  # between before and after: room for the arrow
_PAD = 18
_LABEL = 24  # above a picture
_CAPTION = 64  # below the pictures: prompt, and what was done
_REVISED = 22  # per line of the refined prompt
_HEAD = 92
_MARGIN = 24
_CARD_W = 2 * TILE + _GAP + 2 * _PAD

_PAPER, _CARD, _LINE = "#eef0f3", "#ffffff", "#d4d8de"
_INK, _GREY = "#1b1f24", "#68707b"
_COLOURS = {"allowed": "#2e7d32", "refined": "#b26a00", "blocked": "#b3261e", "not judged": "#b3261e"}


@dataclass(frozen=True, slots=True)
class Card:
    """The place of one prompt on the sheet, in pixels: box, and left and upper edge of its two pictures."""

    box: tuple[int, int, int, int]
    before: tuple[int, int]
    after: tuple[int, int]


def lay_out(results: Sequence[Result]) -> list[Card]:
    """Where every prompt stands, two in a row; a row is as high as its longest caption needs."""
    cards: list[Card] = []
    top = _HEAD
    for start in range(0, len(results), COLUMNS):
        row = results[start : start + COLUMNS]
        extra = max(len(_revised_lines(result)) for result in row) * _REVISED
        height = 2 * _PAD + _LABEL + TILE + _CAPTION + extra
        for column in range(len(row)):
            left = _MARGIN + column * (_CARD_W + _MARGIN)
            x, y = left + _PAD, top + _PAD + _LABEL
            cards.append(Card((left, top, left + _CARD_W, top + height), (x, y), (x + TILE + _GAP, y)))
        top += height + _MARGIN
    return cards


def draw(results: Sequence[Result], *, title: str, subtitle: str) -> Image.Image:
    """The sheet as an RGB picture; two prompts a row."""
    cards = lay_out(results)
    height = max([_HEAD, *(card.box[3] for card in cards)]) + _MARGIN
    width = 2 * _MARGIN + COLUMNS * _CARD_W + (COLUMNS - 1) * _MARGIN
    sheet = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((_MARGIN, 20), title, _INK, _font(26))
    pen.text((_MARGIN, 56), _fit(subtitle, _font(15), width - 2 * _MARGIN, 1)[0], _GREY, _font(15))
    for card, result in zip(cards, results, strict=True):
        _draw_card(sheet, pen, card, result)
    return sheet


def _draw_card(sheet: Image.Image, pen: ImageDraw.ImageDraw, card: Card, result: Result) -> None:
    pen.rounded_rectangle(card.box, 12, _CARD, _LINE)
    for (x, y), label, picture in (
        (card.before, "without guard", result.before),
        (card.after, "with guard", result.after),
    ):
        pen.text((x, y - _LABEL + 2), label, _GREY, _font(14))
        _draw_tile(sheet, pen, x, y, picture)
    middle = card.before[1] + TILE // 2
    start = card.before[0] + TILE + 10
    end = card.after[0] - 10
    pen.line((start, middle, end - 6, middle), _GREY, 3)
    pen.polygon([(end, middle), (end - 9, middle - 6), (end - 9, middle + 6)], _GREY)
    _draw_caption(pen, card.before[0], card.before[1] + TILE + 12, result)


def _draw_tile(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, x: int, y: int, picture: Image.Image | None
) -> None:
    if picture is None:
        pen.rectangle((x, y, x + TILE - 1, y + TILE - 1), "#e3e5e9")
        pen.text((x + TILE // 2, y + TILE // 2), "withheld", _GREY, _font(20), anchor="mm")
    else:
        small = picture.convert("RGB")
        scale = TILE / max(small.size)
        size = (max(round(small.width * scale), 1), max(round(small.height * scale), 1))
        small = small.resize(size, Image.Resampling.LANCZOS)
        pen.rectangle((x, y, x + TILE - 1, y + TILE - 1), "#ffffff")
        sheet.paste(small, (x + (TILE - small.width) // 2, y + (TILE - small.height) // 2))
    pen.rectangle((x - 1, y - 1, x + TILE, y + TILE), outline=_LINE)


def _draw_caption(pen: ImageDraw.ImageDraw, x: int, y: int, result: Result) -> None:
    """Prompt, badge with the action, reason, and the refined prompt."""
    width = _CARD_W - 2 * _PAD
    big, small = _font(17), _font(15)
    pen.text((x, y), _fit(visible(result.prompt.text), big, width, 1)[0], _INK, big)
    word = done(result.report)
    colour = _COLOURS.get(word, _GREY)
    badge = int(small.getlength(word)) + 20
    pen.rounded_rectangle((x, y + 28, x + badge, y + 50), 11, colour)
    pen.text((x + badge // 2, y + 39), word, "#ffffff", small, anchor="mm")
    reason = visible(why(result.report)).replace("≥", ">=")  # the built-in font has no such sign
    reason = f"{reason};  guard {result.report.latency_ms:.0f} ms"
    pen.text(
        (x + badge + 12, y + 39), _fit(reason, small, width - badge - 12, 1)[0], _GREY, small, anchor="lm"
    )
    for i, line in enumerate(_revised_lines(result)):
        pen.text((x, y + 58 + i * _REVISED), line, colour, big)


def _revised_lines(result: Result) -> list[str]:
    """The refined prompt in lines that fit into a card; none where the prompt was used as it is."""
    revised = result.report.revised_prompt
    if revised is None or result.report.blocked:
        return []
    return _fit(f"now: {visible(revised)}", _font(17), _CARD_W - 2 * _PAD, 2)


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, lines: int) -> list[str]:
    """The text in at most so many lines of a width in pixels; what does not fit is cut and marked."""
    found = [""]
    for word in text.split():
        longer = f"{found[-1]} {word}".strip()
        if font.getlength(longer) <= width or not found[-1]:
            found[-1] = longer
        else:
            found.append(word)
    cut = len(found) > lines
    found = found[:lines]
    if cut:
        found[-1] += " ..."
    while font.getlength(found[-1]) > width and len(found[-1]) > 4:
        found[-1] = found[-1].removesuffix(" ...")[:-1].rstrip() + " ..."
    return found


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
