from __future__ import annotations

import json
from pathlib import Path

import pytest

from safeguard.bench.run import run_bench, write
from safeguard.bench.settings import Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(work=tmp_path / "work", repeats=2, tiny=True)


def test_an_unknown_section_is_named(settings: Settings) -> None:
    with pytest.raises(ValueError, match="no section speed; known: text, image, concurrency, growth"):
        run_bench(settings, ["text", "speed"])


@pytest.mark.slow
def test_pictures_are_measured_and_written(settings: Settings, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the exporter is not installed (extra export)")
    pytest.importorskip("diffusers", reason="diffusers is not installed (extra diffusers)")

    write(run_bench(settings, ["image"]), tmp_path / "out")

    text = (tmp_path / "out" / "bench.json").read_text(encoding="utf-8")
    found = json.loads(text)["sections"][0]
    assert found["failed"] == {}
    assert len(found["rows"]) == 8  # four contenders, four pictures and one
    assert [row["runs"] for row in found["rows"]] == [2] * 8
    assert str(tmp_path) not in text
    assert (tmp_path / "out" / "bench.svg").read_text(encoding="utf-8").startswith("<svg")


@pytest.mark.parametrize(("seconds", "repeats"), [(0.001, 20), (0.5, 10), (4.0, 3)])
def test_repeats_of_a_cell_fit_into_its_budget(seconds: float, repeats: int) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed (extra torch)")
    from safeguard.bench.growth import repeats_in

    assert repeats_in(5.0, seconds, 20) == repeats  # 5 s hold 5000, 10 and 1; 20 at most, 3 at least
