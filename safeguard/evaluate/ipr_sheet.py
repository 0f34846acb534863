"""The sheet of rounds: for a few prompts the bare picture and that after each round, with its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from safeguard.demo.results import visible
from safeguard.evaluate.ipr_judges import PictureJudge
from safeguard.evaluate.ipr_loops import Stream
from safeguard.images import to_array

if TYPE_CHECKING:
    from safeguard.evaluate.ipr_metrics import Record

TILE = 160
"""Side of a picture on the sheet, in pixels."""
_GAP, _HEAD, _TITLE, _LABEL, _LINE, _LINES = 12, 44, 26, 20, 15, 3
_PAPER, _INK, _GREY, _GOOD, _BAD = "#ffffff", "#1b1f24", "#68707b", "#2e7d32", "#b3261e"


def keep_pictures(folder: Path, record: Record, streams: Sequence[Stream], *, most: int) -> None:
    """Writes one stream of the prompt as PNGs: the first that is flagged unguarded, else the first.

    At most `most` prompts of either kind are kept.
    """
    place, flagged = _chosen(record)
    kind = "flagged" if flagged else "other"
    if len({path.name.split("-")[0] for path in folder.glob(f"*-{kind}-*.png")}) >= most:
        return
    folder.mkdir(parents=True, exist_ok=True)
    stream = streams[place]
    for step, image in enumerate([stream.bare, *stream.images]):
        if image is not None:
            small = ImageOps.contain(Image.fromarray(to_array(image)), (TILE, TILE))
            small.save(folder / f"{record['prompt']:06}-{kind}-{step}.png")


def draw_sheet(folder: Path, records: Sequence[Record], judge: PictureJudge, *, most: int = 6) -> Image.Image:
    """The sheet as an RGB picture, a prompt a row, from the pictures in the folder; flagged ones first."""
    kept: dict[int, dict[int, Path]] = {}
    for path in sorted(folder.glob("*.png"), key=lambda p: ("-flagged-" not in p.name, p.name)):
        prompt, _, step = path.stem.split("-")
        kept.setdefault(int(prompt), {})[int(step)] = path
    shown = list(kept.items())[:most]
    columns = max((len(record["streams"][0]["texts"]) + 1 for record in records), default=1)
    height = _HEAD + len(shown) * (_TITLE + _LABEL + TILE + _LINES * _LINE + _GAP) + _GAP
    width = _GAP + columns * (TILE + _GAP)
    sheet = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((_GAP, 12), _fit(f"rounds of refinement, scores by {judge.name}", 17, width)[0], _INK, _font(17))
    top = _HEAD
    found = {record["prompt"]: record for record in records}
    for number, pictures in shown:
        _draw_row(sheet, pen, top, found[number], pictures, judge)
        top += _TITLE + _LABEL + TILE + _LINES * _LINE + _GAP
    return sheet


def _draw_row(
    sheet: Image.Image,
    pen: ImageDraw.ImageDraw,
    top: int,
    record: Record,
    pictures: dict[int, Path],
    judge: PictureJudge,
) -> None:
    stream = record["streams"][_chosen(record)[0]]
    action = stream["action"]
    title = f"{record['prompt']}: {visible(record['text'])}"
    pen.text((_GAP, top), _fit(title, 15, sheet.width - 2 * _GAP)[0], _INK, _font(15))
    for step in range(len(stream["texts"]) + 1):
        x, y = _GAP + step * (TILE + _GAP), top + _TITLE
        score = stream["scores"][judge.name][step]
        name = "bare" if step == 0 else f"round {step - 1}"
        colour = _GREY if score is None else _BAD if score >= judge.threshold else _GOOD
        last = f", {action}" if step == len(stream["texts"]) else ""
        pen.text((x, y), f"{name}{'' if score is None else f': {score:.2f}'}{last}", colour, _font(13))
        if step in pictures and score is not None:
            with Image.open(pictures[step]) as image:
                sheet.paste(image.convert("RGB"), (x, y + _LABEL))
        else:
            pen.text((x + TILE // 2, y + _LABEL + TILE // 2), "refused", _GREY, _font(15), anchor="mm")
        pen.rectangle((x - 1, y + _LABEL - 1, x + TILE, y + _LABEL + TILE), outline=colour)
        if step and (step == 1 or stream["drawn"][step - 1]):
            text = visible(stream["texts"][step - 1])
            for i, line in enumerate(_fit(text, 12, TILE, lines=_LINES)):
                pen.text((x, y + _LABEL + TILE + 3 + i * _LINE), line, _GREY, _font(12))


def _chosen(record: Record) -> tuple[int, bool]:
    """Which stream is shown, and whether its bare picture is flagged: marked so when it was recorded."""
    flags = record["flagged_bare"]
    return (flags.index(True), True) if True in flags else (0, False)


def _fit(text: str, size: int, width: int, *, lines: int = 1) -> list[str]:
    """The text in at most so many lines of a width in pixels; what does not fit is cut and marked."""
    font, found = _font(size), [""]
    for word in text.split():
        longer = f"{found[-1]} {word}".strip()
        if font.getlength(longer) <= width or not found[-1]:
            found[-1] = longer
        else:
            found.append(word)
    found = [*found[:lines]] if len(found) <= lines else [*found[: lines - 1], f"{found[lines - 1]} ..."]
    return [_cut(line, font, width) for line in found]


def _cut(line: str, font: Any, width: int) -> str:
    while font.getlength(line) > width and len(line) > 4:
        line = line.removesuffix(" ...")[:-1].rstrip() + " ..."
    return line


def _font(size: int) -> Any:
    return ImageFont.load_default(size)
