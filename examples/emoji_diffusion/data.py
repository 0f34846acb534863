"""The world of the example: emoji with their names, scenes of them with captions, labels for a family app."""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import tarfile
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIZE_PX = 64
PICTURES = "emoji-datasource-google-16.0.0.tgz"  # npm pack emoji-datasource-google@16.0.0; Noto, Apache-2.0
KEYWORDS = "emojilib-4.0.3.tgz"  # npm pack emojilib@4.0.3; MIT
SHA256 = {
    PICTURES: "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    KEYWORDS: "7f9a6b43cff31d18985b7d65d11faba5bd971cbcc60020cf6d09322fbaaaf303",
}

_FRAMES = (
    "{}",
    "{}",
    "{}",
    "{}",
    "a picture of {}",
    "a photo of {}",
    "an image of {}",
    "a drawing of {}",
    "{}, emoji",
)
_JOINTS = ("and", "and", "with", "next to", "beside", "near", "plus")
_DOING = ("with", "holding", "looking at", "next to", "and")  # between somebody and a thing
_NUMBERS = {2: "two", 3: "three", 4: "four"}
_SPOTS = {  # left and top of each half-size emoji, by how many there are
    2: ((0, 16), (32, 16)),
    3: ((16, 0), (0, 32), (32, 32)),
    4: ((0, 0), (32, 0), (0, 32), (32, 32)),
}
_HELD_OUT_EVERY = 41  # one caption in so many is never trained on

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Emoji:
    """One drawable emoji. picture: (64, 64, 4) RGBA. names: plainest first. loved: words.toml names it."""

    key: str
    names: tuple[str, ...]
    group: str
    picture: Pixels
    loved: bool


@dataclass(frozen=True, slots=True)
class Scene:
    """What a picture shows: one to four emoji by key, their paint, the background; and how it may be put."""

    keys: tuple[str, ...]
    captions: tuple[str, ...]
    paint: str = ""
    background: str = ""


@cache
def words() -> dict[str, Any]:
    """The tables of `words.toml`."""
    with (Path(__file__).parent / "words.toml").open("rb") as file:
        return tomllib.load(file)


def read_emoji(folder: Path) -> dict[str, Emoji]:
    """All drawable emoji by key, from the two npm archives in a folder, in the order of the data set.

    Raises FileNotFoundError with the command that gets them, ValueError where an archive is another one.
    """
    for name, digest in SHA256.items():
        if not (folder / name).is_file():
            wanted = "emoji-datasource-google@16.0.0 emojilib@4.0.3"
            raise FileNotFoundError(f"no {name} in {folder}; run there: npm pack {wanted}")
        with (folder / name).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != digest:
            raise ValueError(f"{name} must have the SHA-256 {digest}, got {found}")
    with tarfile.open(folder / KEYWORDS) as archive:
        keywords = json.loads(_member(archive, "package/dist/emoji-en-US.json"))
    with tarfile.open(folder / PICTURES) as archive:
        rows = [row for row in json.loads(_member(archive, "package/emoji.json")) if _is_drawable(row)]
        wanted_files = {f"package/img/google/64/{row['image']}" for row in rows}
        files = {m.name: _member(archive, m.name) for m in archive if m.name in wanted_files}
    rows.sort(key=lambda row: row["sort_order"])
    own = [_keywords(row, keywords) for row in rows]
    rare = {word for word, n in Counter(w for found in own for w in found[1:]).items() if n == 1}
    return {
        row["short_name"]: Emoji(
            row["short_name"],
            _names(row["short_name"], row["short_names"], found, rare),
            row["subcategory"],
            _pixels(files[f"package/img/google/64/{row['image']}"]),
            row["short_name"] in words()["names"],
        )
        for row, found in zip(rows, own, strict=True)
    }


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise ValueError(f"{name} must be a file of the archive")
    return file.read()


def _is_drawable(row: dict[str, Any]) -> bool:
    skip, key = words()["skip"], row["short_name"]
    if key in words()["names"] or any(key in keys for keys in words()["inappropriate"].values()):
        return True
    return (
        row["has_img_google"]
        and row["category"] not in skip["categories"]
        and row["subcategory"] not in skip["subcategories"]
        and key not in skip["names"]
        and not any(part in key for part in skip["containing"])
        and "-200D-264" not in row["unified"]  # the woman's and the man's form of a person
    )


def _keywords(row: dict[str, Any], keywords: dict[str, list[str]]) -> list[str]:
    """The word list's name of an emoji and its keywords, as plain lower-case words."""
    character = "".join(chr(int(part, 16)) for part in row["unified"].split("-"))
    found = keywords.get(character) or keywords.get(character.replace("\ufe0f", "")) or [row["name"]]
    plain = [re.sub(r" s\b", "'s", re.sub(r"[_\xa0’]", " ", word).lower()).strip() for word in found]
    return [
        word for word in dict.fromkeys(plain) if word.isascii() and word not in words()["skip"]["keywords"]
    ]


def _names(key: str, short_names: Sequence[str], found: Sequence[str], rare: set[str]) -> tuple[str, ...]:
    """Our own names, the list's name, short names that are words, and keywords that name no other emoji."""
    own = words()["names"].get(key, [])
    short = [
        name.replace("_", " ").replace("-", " ") for name in short_names if name.replace("_", "").isalpha()
    ]
    extra = [word for word in found[1:] if word in rare and len(word) > 2]
    names = [*own, *found[:1], *(name for name in short if len(name) > 2), *extra[: 2 if own else 3]]
    return tuple(dict.fromkeys(names))


def _pixels(png: bytes) -> Pixels:
    with Image.open(io.BytesIO(png)) as image:
        return np.array(image.convert("RGBA").resize((SIZE_PX, SIZE_PX), Image.Resampling.LANCZOS))


def with_article(name: str) -> str:
    """The name with "a" or "an", or as it is where it is a plural or has a number or an article."""
    first, last = name.split()[0], re.split(" (?:of|with|in|on) ", name)[0]
    if first in {"a", "an", "the", "two", "no", "santa", "father", "milk", "money"} or (
        last.endswith("s") and not last.endswith(("ss", "us"))
    ):
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def plural(name: str) -> str:
    """The name for several of a kind: "slice of pizza" becomes "slices of pizza"."""
    head, of, rest = name.partition(" of ")
    if head.endswith("s"):
        return name
    if head.endswith(("sh", "ch", "x", "ss")):
        head += "es"
    elif head.endswith("y") and head[-2:-1] not in "aeiou":
        head = head[:-1] + "ies"
    elif head.endswith("man"):
        head = head[:-3] + "men"
    else:
        head += "s"
    return head + of + rest


def single(emoji: Emoji) -> Scene:
    """One emoji on white. Its captions: every name with and without an article."""
    found = [form for name in emoji.names for form in (with_article(name), name)]
    return Scene((emoji.key,), tuple(dict.fromkeys(found)))


def compositions(emoji: dict[str, Emoji], count: int, seed: int) -> list[Scene]:
    """That many scenes of the harder kinds: several emoji, coloured backgrounds, repainted things."""
    rng = random.Random(seed)  # a data set, not a secret
    keys = list(emoji)
    weights = [4 if e.loved else 1 for e in emoji.values()]
    people = [
        key
        for key, e in emoji.items()
        if e.group in {"person", "person-role"} or e.group.startswith("animal")
    ]
    paintable = [key for key in words()["repaint"] if key in emoji]
    scenes = []
    for _ in range(count):
        kind = rng.random()
        (first,), (second,) = rng.choices(keys, weights), rng.choices(keys, weights)
        if kind < 0.40:
            scenes.append(_pair(emoji[first], emoji[second], _JOINTS, rng))
        elif kind < 0.55:
            scenes.append(_pair(emoji[rng.choice(people or keys)], emoji[second], _DOING, rng))
        elif kind < 0.67:
            scenes.append(_several(emoji[first], rng.choices((2, 3, 4), (4, 2, 1))[0], rng))
        elif kind < 0.85 or not paintable:
            scenes.append(_on_background(emoji[first], rng))
        else:
            scenes.append(_repainted(rng.choice(paintable), rng))
    return scenes


def _name(emoji: Emoji, rng: random.Random) -> str:
    return rng.choice(emoji.names[: len(words()["names"].get(emoji.key, "1"))])


def _pair(left: Emoji, right: Emoji, joints: Sequence[str], rng: random.Random) -> Scene:
    captions = [
        f"{with_article(_name(left, rng))} {rng.choice(joints)} {with_article(_name(right, rng))}"
        for _ in range(2)
    ]
    return Scene((left.key, right.key), tuple(dict.fromkeys(captions)))


def _several(emoji: Emoji, count: int, rng: random.Random) -> Scene:
    names = plural(emoji.names[0]), plural(_name(emoji, rng))
    return Scene((emoji.key,) * count, tuple(dict.fromkeys(f"{_NUMBERS[count]} {name}" for name in names)))


def _on_background(emoji: Emoji, rng: random.Random) -> Scene:
    colour, name = rng.choice(list(words()["colours"])), with_article(_name(emoji, rng))
    captions = (f"{name} on {with_article(colour)} background", f"{name}, {colour} background")
    return Scene((emoji.key,), captions, background=colour)


def _repainted(key: str, rng: random.Random) -> Scene:
    paint, name = rng.choice(list(words()["paints"])), rng.choice(words()["repaint"][key])
    return Scene((key,), (with_article(f"{paint} {name}"), f"{paint} {name}"), paint=paint)


def split(scenes: Sequence[Scene]) -> tuple[list[Scene], list[Scene]]:
    """Scenes to train on, and held out: about one scene of several emoji or of a paint in 41, by its caption.

    All scenes with the same emoji, paint and background fall on the same side.
    """
    train: list[Scene] = []
    held_out: list[Scene] = []
    for scene in scenes:
        what = "|".join((*scene.keys, scene.paint, scene.background))
        place = int.from_bytes(hashlib.sha256(what.encode()).digest()[:4], "big")
        is_held_out = place % _HELD_OUT_EVERY == 0 and (len(scene.keys) > 1 or scene.paint)
        (held_out if is_held_out else train).append(scene)
    return train, held_out


def frame(caption: str, rng: random.Random) -> str:
    """The caption as somebody may ask for it: now and then "a picture of ..."."""
    return rng.choice(_FRAMES).format(caption)


def draw(scene: Scene, emoji: dict[str, Emoji]) -> Pixels:
    """The picture of a scene: (64, 64, 3), transparent parts filled with the background, white if none."""
    colour = tuple(words()["colours"][scene.background]) if scene.background else (255, 255, 255)
    canvas = Image.new("RGBA", (SIZE_PX, SIZE_PX), (*colour, 255))
    pictures = [Image.fromarray(repaint(emoji[key].picture, scene.paint)) for key in scene.keys]
    if len(pictures) == 1:
        canvas.alpha_composite(pictures[0])
    else:
        half = (SIZE_PX // 2, SIZE_PX // 2)
        for picture, spot in zip(pictures, _SPOTS[len(pictures)], strict=True):
            canvas.alpha_composite(picture.resize(half, Image.Resampling.LANCZOS), spot)
    return np.array(canvas.convert("RGB"))


def repaint(picture: Pixels, paint: str) -> Pixels:
    """The picture with its main hue, and all within 35 degrees of it, turned to the paint's; as it is for "".

    picture: (64, 64, 4) RGBA.
    """
    if not paint:
        return picture
    hsv = np.array(Image.fromarray(picture[..., :3]).convert("HSV"))  # hue of 256 steps
    coloured = (picture[..., 3] > 128) & (hsv[..., 1] > 80)
    if not coloured.any():
        return picture
    hues = hsv[..., 0].astype(int)
    main = int(np.bincount(hues[coloured] // 8, minlength=32).argmax()) * 8 + 4
    apart = np.abs((hues - main + 128) % 256 - 128)
    turned = hsv.copy()
    hue = round(words()["paints"][paint] / 360 * 256) % 256
    turned[..., 0] = np.where((apart <= 25) & (hsv[..., 1] > 40), hue, hues)
    result = picture.copy()
    result[..., :3] = np.array(Image.fromarray(turned, "HSV").convert("RGB"))
    return result


def label(key: str) -> tuple[int, str] | None:
    """1 and its category if a family app would not show it, 0 and "" if it would, None if unlabelled."""
    if key in words()["held_out"]["unlabelled"]:
        return None
    for category, keys in words()["inappropriate"].items():
        if key in keys:
            return 1, category
    return 0, ""


def write_labelled(emoji: dict[str, Emoji], folder: Path, *, seed: int = 0) -> Counter[str]:
    """Pictures as PNG with `labels.jsonl`, for a head that finds the inappropriate ones; the rows by kind.

    A row: file, label (1 inappropriate), category, split ("train" or "held_out"), name. Each emoji is drawn
    on white, on two other backgrounds and beside a harmless emoji of its own split; an inappropriate one on
    six backgrounds and beside up to six others.
    """
    rng = random.Random(seed)  # a data set, not a secret
    held_out = set(words()["held_out"]["inappropriate"]) | set(words()["held_out"]["appropriate"])
    labelled = {key: found for key in emoji if (found := label(key)) is not None}
    harmless = [key for key, (is_bad, _) in labelled.items() if not is_bad]
    held_out |= set(harmless[::7])
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    rows, counts = [], Counter[str]()
    for key, (is_bad, category) in labelled.items():
        part = "held_out" if key in held_out else "train"
        company = [other for other in harmless if (other in held_out) == (key in held_out) and other != key]
        colours = rng.sample(list(words()["colours"]), 6 if is_bad else 2)
        scenes = [Scene((key,), ()), *(Scene((key,), (), background=colour) for colour in colours)]
        for other in rng.sample(company, min(6 if is_bad else 1, len(company))):
            scenes.append(Scene((key, other) if rng.random() < 0.5 else (other, key), ()))
        for i, scene in enumerate(scenes):
            name = f"pictures/{key.replace('+', 'plus').replace('-', '_')}_{i}.png"
            Image.fromarray(draw(scene, emoji)).save(folder / name)
            about = {"label": is_bad, "category": category, "split": part, "name": emoji[key].names[0]}
            rows.append(json.dumps({"file": name, **about}))
            counts[f"{part} {category or 'appropriate'}"] += 1
    (folder / "labels.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return counts
