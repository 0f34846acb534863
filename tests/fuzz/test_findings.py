"""What fuzzing found, each as a small input of its own: first a crash, now a documented error."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path

import pytest
from PIL import Image

from safeguard.errors import PackError, PolicyError
from safeguard.images import open_image, views
from safeguard.packs import read_pack
from safeguard.policy import Policy

MANIFEST = {
    "name": "tiny",
    "version": "1",
    "kind": "refiner",
    "model": {"file": "model.onnx", "inputs": ["x"], "outputs": ["y"]},
    "files": {"model.onnx": "0" * 64},
    "license": "MIT",
}


def test_later_page_of_a_tiff_without_a_size_is_refused() -> None:
    file = io.BytesIO()
    Image.new("L", (4, 4)).save(file, "TIFF")
    data = bytearray(file.getvalue())
    (at,) = struct.unpack_from(
        "<I", data, 4
    )  # the first directory: its length, entries of 12 bytes, the next one
    (entries,) = struct.unpack_from("<H", data, at)
    struct.pack_into("<I", data, at + 2 + 12 * entries, len(data))
    data += struct.pack("<HHHIII", 1, 262, 3, 1, 1, 0)  # a directory that says only that black is zero

    with pytest.raises(ValueError, match="the picture cannot be decoded"):  # Pillow: TypeError
        views(Image.open(io.BytesIO(data)))


def test_avif_with_damaged_pixels_is_refused_as_unreadable(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 90).convert("RGB").save(file, "AVIF")
    data = bytearray(file.getvalue())
    start = data.index(b"mdat") + 4
    data[start:] = b"\xff" * (len(data) - start)  # Pillow: RuntimeError
    (tmp_path / "a.avif").write_bytes(data)

    with pytest.raises(ValueError, match=r"a\.avif cannot be read as a picture"):
        open_image(tmp_path / "a.avif")


def gif(second: bytes) -> Image.Image:
    """A GIF of 2 x 2 pixels whose second frame has the given descriptor: left, top, width, height, flags."""
    frame = b"\x02\x03\x44\x34\x05\x00"  # LZW of four pixels: code size, one block, its end
    header = b"GIF89a\x02\x00\x02\x00\xf0\x00\x00" + b"\x00\x00\x00\xff\xff\xff"
    first = b"\x2c\x00\x00\x00\x00\x02\x00\x02\x00\x00"
    return Image.open(io.BytesIO(header + first + frame + b"\x2c" + second + frame + b"\x3b"))


def test_later_frame_that_is_a_bomb_of_its_own_is_refused() -> None:
    huge = b"\x00\x00\x00\x00\xff\xff\xff\xff\x00"  # 65535 x 65535; Pillow: DecompressionBombError

    with pytest.raises(ValueError, match="the picture cannot be decoded"):
        views(gif(huge))


def test_later_frame_that_is_cut_off_is_refused() -> None:
    picture = gif(b"\x00\x00")

    with pytest.raises(ValueError, match="the picture cannot be decoded"):
        views(picture)


@pytest.mark.parametrize("form", ["json", "yaml"])
def test_policy_with_half_a_surrogate_pair_is_refused(form: str) -> None:
    text = '{"input": {"llm": {"categories": {"\\ud800": {"threshold": 0.1}}}}}'

    with pytest.raises(PolicyError, match=rf"not valid {form.upper()}: .* surrogates not allowed"):
        Policy.from_text(text, form)  # type: ignore[arg-type]  # the two are among its forms


@pytest.mark.parametrize("change", [{"notes": "\ud800"}, {"\ud800": 1}, {"files": {"\ud800": "0" * 64}}])
def test_manifest_with_half_a_surrogate_pair_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    (tmp_path / "safeguard.json").write_text(json.dumps(MANIFEST | change), encoding="utf-8")

    with pytest.raises(PackError, match=r"is not valid JSON: .* surrogates not allowed"):
        read_pack(tmp_path)


def test_manifest_with_a_zero_byte_in_a_file_name_is_refused(tmp_path: Path) -> None:
    files = {"files": {"model.onnx": "0" * 64, "a\x00b": "0" * 64}}
    (tmp_path / "safeguard.json").write_text(json.dumps(MANIFEST | files), encoding="utf-8")

    with pytest.raises(PackError, match="must be a relative path inside the pack"):
        read_pack(tmp_path)


@pytest.mark.parametrize("sign", ["\x85", "\u2028", "\ufeff"])
def test_name_with_a_line_break_of_another_kind_survives_yaml(sign: str) -> None:
    policy = Policy.from_text(
        json.dumps({"input": {"llm": {"categories": {f"a{sign}b": {"threshold": 0.5}}}}}), "json"
    )

    assert Policy.from_text(policy.to_text("yaml"), "yaml") == policy
