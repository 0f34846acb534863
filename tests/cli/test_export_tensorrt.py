from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from tests.tiny_packs import rude_pack

pytest.importorskip("onnx", reason="onnx is not installed (extra export)")
pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed (extra tensorrt-rtx)")

Run = Callable[..., Result]


@pytest.fixture
def pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return rude_pack(tmp_path / "rude")


def export(run: Run, *arguments: str | Path) -> Result:
    return run("export", "tensorrt", *arguments, "--flavour", "tensorrt_rtx")


def test_an_engine_is_built_into_the_cache(run: Run, pack: Path, tmp_path: Path) -> None:
    done = export(run, pack, "--batches", "4,1", "--lengths", "8", "--json")

    said = json.loads(done.stdout)
    assert done.exit_code == 0
    assert said["buckets"] == {"lengths": [8, 16], "batches": [1, 4]}
    assert Path(said["path"]).is_relative_to(tmp_path / "cache" / "safeguard" / "engines")
    assert Path(said["path"]).is_file()


def test_an_onnx_file_is_built_for_the_gpus_named(run: Run, pack: Path) -> None:
    done = export(run, pack / "model.onnx", "--lengths", "8", "--batches", "1", "--architecture", "sm89")

    assert done.exit_code == 0
    assert ", sm89, float32" in done.stdout
    assert "lengths 8; batches 1; " in done.stdout


def test_a_pack_with_the_engine_is_written(run: Run, pack: Path, tmp_path: Path) -> None:
    done = export(run, pack, "--out", tmp_path / "out")

    assert done.exit_code == 0
    assert done.stdout.startswith(f"{tmp_path / 'out'}: tensorrt_rtx ")
    assert (tmp_path / "out" / "model.engine").is_file()


def test_a_pack_cannot_be_made_of_a_bare_file(run: Run, pack: Path, tmp_path: Path) -> None:
    done = export(run, pack / "model.onnx", "--out", tmp_path / "out")

    assert done.exit_code == 2
    assert "--out writes a pack, so MODEL must be one" in done.stderr


@pytest.mark.parametrize("sizes", ["8,", "a", "0", "-1", "²"])
def test_sizes_are_whole_numbers(run: Run, pack: Path, sizes: str) -> None:
    done = export(run, pack, f"--batches={sizes}")

    assert done.exit_code == 2
    assert "sizes must be whole numbers such as 16,32,64" in done.stderr


def test_fp8_without_modelopt_names_the_command(
    run: Run, pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "modelopt", None)  # which makes it impossible to import
    (tmp_path / "texts.txt").write_text("good day\n" * 8, encoding="utf-8")

    done = export(
        run, pack, "--dtype", "fp8", "--calibrate", tmp_path / "texts.txt", "--out", tmp_path / "out"
    )

    assert done.exit_code == 2
    assert "run: pip install 'nvidia-modelopt[onnx]'" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--dtype", "fp8", "--calibrate", "texts.txt"], "so it is written as a pack: give --out"),
        (["--dtype", "fp8", "--out", "out"], "--dtype fp8 and --calibrate go together"),
        (["--calibrate", "texts.txt", "--out", "out"], "--dtype fp8 and --calibrate go together"),
    ],
)
def test_options_of_fp8_go_together(run: Run, pack: Path, options: list[str], said: str) -> None:
    done = export(run, pack, *options)

    assert done.exit_code == 2
    assert said in done.stderr
