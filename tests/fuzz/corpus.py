"""Seeds and words of each target, and a mutator over them: one input for every (seed, target, number)."""

from __future__ import annotations

import gzip
import io
import json
import random
from functools import cache
from importlib import resources

import numpy as np
from PIL import Image

from tests.fuzz.texts import PIECES, WORDS

_MANIFEST = {
    "format": 1,
    "name": "rude-words",
    "version": "1",
    "kind": "text_classifier",
    "model": {"file": "model.onnx", "inputs": ["input_ids"], "outputs": ["logits"]},
    "labels": ["toxic"],
    "heads": {"all": ["toxic"]},
    "operating_points": {"strict": {"toxic": 0.3}},
    "temperatures": {"toxic": 1.5},
    "window": {"tokens": 16, "overlap": 4},
    "files": {"model.onnx": "0" * 64},
    "license": "none",
}
_JSON_WORDS = [*WORDS["json"], "[" * 300, '{"a":' * 300, "9" * 5000]


@cache
def seeds(target: str) -> tuple[bytes, ...]:
    """Valid inputs to start from."""
    if target == "policy":
        names = ("monitor", "lenient", "standard", "strict")
        files = [(resources.files("safeguard") / f"data/presets/{name}.yaml").read_bytes() for name in names]
        toml = b'name = "mine"\n[input.llm]\naction = "refine"\nthreshold = 0.4\n'
        plain = b'{"input": {"llm": {"categories": {"toxic": {"threshold": 0.1, "action": "block"}}}}}'
        return (*(b"\0" + file for file in files), b"\1" + toml, b"\2" + plain, b"\0name: a\n")
    if target == "manifest":
        return (
            json.dumps(_MANIFEST).encode(),
            json.dumps(
                _MANIFEST | {"kind": "image_classifier", "image": {"size": 16, "resize": 16}}
            ).encode(),
            b"{}",
        )
    if target == "jsonl":
        rows = b'{"text": "a day out"}\n{"text": "", "n": 1.5}\n'
        rows += b'{"id": [1, {"a": null}], "text": "\xc3\xa9\\ud800"}\n'
        return rows, gzip.compress(rows, mtime=0), b"a day out\nanother\r\n", b""
    if target == "image":
        return tuple(_pictures())
    groups = ["".join(PIECES[i : i + 5]) for i in range(0, len(PIECES), 5)]
    return (
        *(bytes([kind]) + group.encode("utf-8", "surrogatepass") for group in groups for kind in range(5)),
        b"\2the kill all of a kind",
        b"\4\x20k1ll ",
        b"\0" + "क्ष می‌خواهم 한글 日本語 ไทย 👨‍👩‍👧".encode(),
    )


def _pictures() -> list[bytes]:
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 255, (24, 32, 3), np.uint8))
    deep = Image.fromarray(rng.integers(0, 65535, (9, 7), np.uint16))
    made: list[bytes] = []
    for picture, form, options in (
        (rgb, "PNG", {}),
        (rgb.convert("P"), "PNG", {"transparency": 0}),
        (rgb.convert("LA"), "PNG", {}),
        (deep, "PNG", {}),
        (rgb.convert("1"), "PNG", {}),
        (rgb, "JPEG", {}),
        (rgb.convert("CMYK"), "JPEG", {"progressive": True}),
        (rgb, "GIF", {"save_all": True, "append_images": [rgb.rotate(90), rgb.rotate(180)]}),
        (rgb, "WEBP", {"save_all": True, "append_images": [rgb.rotate(90)]}),
        (rgb.convert("RGBA"), "WEBP", {"lossless": True}),
        (rgb, "BMP", {}),
        (rgb.convert("P"), "BMP", {}),
        (rgb, "PPM", {}),
        (deep, "TIFF", {}),
        (rgb, "TIFF", {"compression": "tiff_lzw", "save_all": True, "append_images": [rgb]}),
        (rgb.convert("RGBA"), "PNG", {"save_all": True, "append_images": [rgb.convert("RGBA")]}),
        (rgb, "JPEG2000", {}),
        (rgb, "AVIF", {}),
    ):
        file = io.BytesIO()
        picture.save(file, form, **options)
        made.append(file.getvalue())
    return made


@cache
def words(target: str) -> tuple[bytes, ...]:
    """Pieces that mean something to what is fuzzed."""
    listed = {
        "policy": WORDS["policy"],
        "manifest": [*_JSON_WORDS, *WORDS["files"], *_MANIFEST, "text_classifier", "image", "clip_heads"],
        "jsonl": _JSON_WORDS,
        "image": ["\0\0\0\0", "IHDR", "IDAT", "IEND", "acTL", "fcTL", "GIF89a", "RIFF", "Exif", "II*\0"],
    }.get(target, list(PIECES))
    numbers = (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\1", b"\0", b"\xff", b"\x80\0")
    return (*(w.encode("utf-8", "surrogatepass") for w in listed), *numbers)


def mutated(seed: int, target: str, number: int) -> bytes:
    """One input, the same for the same three values: a seed after one to eight changes, or plain noise."""
    rng = random.Random(f"{seed}/{target}/{number}")
    if rng.random() < 0.05:
        return rng.randbytes(rng.randrange(200))
    data = bytearray(rng.choice(seeds(target)))
    for _ in range(rng.randint(1, 8)):
        _change(data, target, rng)
    return bytes(data[:20_000])


def _change(data: bytearray, target: str, rng: random.Random) -> None:
    place = rng.randrange(len(data) + 1)
    end = min(len(data), place + rng.randint(1, 16))
    match rng.randrange(9):
        case 0 if place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        case 1 if place < len(data):
            data[place] = rng.randrange(256)
        case 2:
            data[place:end] = b""
        case 3 | 4:
            data[place:place] = rng.choice(words(target))
        case 5:
            data[place:end] = rng.choice(words(target))
        case 6:
            data[place:place] = data[place:end] * rng.choice((1, 2, 30))
        case 7:
            other = rng.choice(seeds(target))
            cut = rng.randrange(len(other) + 1)
            data[place:] = other[cut:]
        case _:
            if rng.random() < 0.2:
                del data[place:]
