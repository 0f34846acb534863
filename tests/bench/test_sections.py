from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from safeguard.bench.report import Section
from safeguard.bench.run import run_bench, write
from safeguard.bench.settings import Settings
from safeguard.bench.timing import Sample


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


@pytest.mark.slow
def test_growth_has_all_repeats_and_its_memory(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript", reason="the exporter is not installed (extra export)")
    from safeguard.bench import growth

    monkeypatch.setattr(growth, "CELLS", [growth.Cell(2, 16), growth.Cell(1, 8)])
    monkeypatch.setattr(growth, "LONGEST_CALL_S", 60.0)
    found = growth.run_growth(settings)

    assert found.failed == {}
    assert [(row.workload, len(row.seconds)) for row in found.rows] == [
        *[("2 x 16 tokens", 2)] * 4,  # in the order of the cells, though the smaller one was measured first
        *[("1 x 8 tokens", 2)] * 4,
    ]
    assert all(row.more["peak_mb"] >= row.more["loaded_mb"] > 0 for row in found.rows)


class Slow:
    """A contender whose every call takes three seconds, it says."""

    peak_mb = 5.0

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, payload: Any, items: int) -> Sample:
        self.calls += 1
        return Sample(3.0, items)


def test_cells_with_long_calls_are_left_out_and_named(settings: Settings) -> None:
    pytest.importorskip("onnxscript", reason="the exporter is not installed (extra export)")
    from safeguard.bench.growth import Cell, Grid

    slow: Any = Slow()
    section = Section("growth", "Growth")
    grid = Grid(section, settings, {"slow": slow}, {"slow": ""}, {"slow": 1.0})
    grid.measure(Cell(1, 16))  # two calls to warm up say 3 s, which is more than 2.5
    grid.measure(Cell(8, 16))  # eight times the tokens: 24 s, so it is not even tried

    assert slow.calls == 2
    assert section.rows == []
    assert grid.left_out() == [
        "slow, left out since a call takes more than 2.5 s: 1 x 16 tokens, 8 x 16 tokens"
    ]


@pytest.fixture
def source(settings: Settings) -> Path:
    """Weights of a tiny classifier, made where the exports are there already."""
    pytest.importorskip("onnxscript", reason="the exporter is not installed (extra export)")
    from safeguard.bench.models import make_text_models

    for name in ("float32", "int8"):
        (settings.work / "text-tiny" / name).mkdir(parents=True)
    return make_text_models(settings.work / "text", tiny=True).source


def test_tiny_models_never_stand_in_for_the_real_ones(source: Path, settings: Settings) -> None:
    assert source == settings.work / "text-tiny" / "source"


def test_a_model_cut_off_half_way_is_made_again(source: Path, settings: Settings) -> None:
    from safeguard.bench.models import make_text_models

    before = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").unlink()

    make_text_models(settings.work / "text", tiny=True)

    assert (source / "model.safetensors").read_bytes() == before  # the same seed
