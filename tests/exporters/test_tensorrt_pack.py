from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from safeguard.backends.engine_cache import EngineCache, read_engine
from safeguard.backends.engine_spec import Buckets
from safeguard.checks.loading import load_check
from safeguard.errors import BackendError, ExportError
from safeguard.exporters.tensorrt_pack import UNCHECKED, buckets_for, build_pack_engine, export_tensorrt
from safeguard.packs import Pack, resolve, seal
from tests.tiny_packs import rude_pack

pytest.importorskip("onnx", reason="onnx is not installed (extra export)")
pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed (extra tensorrt-rtx)")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> EngineCache:
    return EngineCache(tmp_path_factory.mktemp("engines"))


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return resolve(rude_pack(tmp_path_factory.mktemp("packs") / "rude"))


def export(pack: Pack, out: Path, cache: EngineCache, **options: Any) -> Any:
    return export_tensorrt(pack, out, flavour="tensorrt_rtx", cache=cache, **options)


@pytest.fixture
def without_gpu() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")


def test_no_bucket_is_longer_than_the_window(pack: Pack) -> None:
    # the window of this pack has 16 tokens
    assert buckets_for(pack, Buckets(lengths=(4, 8, 16, 512))).lengths == (4, 8, 16)
    assert buckets_for(pack, Buckets(lengths=(4, 12))).lengths == (4, 12, 16)
    assert buckets_for(pack, Buckets(lengths=(64,))).lengths == (16,)


@pytest.mark.usefixtures("without_gpu")
def test_an_exported_pack_is_a_pack_with_the_engine_in_it(
    pack: Pack, cache: EngineCache, tmp_path: Path
) -> None:
    made = export(pack, tmp_path / "out", cache)

    found = resolve(tmp_path / "out")
    spec, _ = read_engine(found.model)
    assert set(made.files) == {"model.engine", "model.engine.json", "tokenizer.json"}
    assert (made.labels, made.window, made.model.inputs) == (
        pack.manifest.labels,
        pack.manifest.window,
        pack.manifest.model.inputs,
    )
    assert spec.buckets.lengths == (16,)
    assert made.export is not None
    assert made.export.versions == {"tensorrt_rtx": spec.version}


@pytest.mark.usefixtures("without_gpu")
def test_a_pack_that_could_not_be_compared_says_so(pack: Pack, cache: EngineCache, tmp_path: Path) -> None:
    made = export(pack, tmp_path / "out", cache)

    assert made.notes == UNCHECKED
    assert made.export is not None
    assert made.export.parity == ()


@pytest.mark.usefixtures("without_gpu")
def test_an_exported_pack_loads_on_a_gpu_and_nowhere_else(
    pack: Pack, cache: EngineCache, tmp_path: Path
) -> None:
    export(pack, tmp_path / "out", cache)

    with pytest.raises(BackendError, match="an engine runs on cuda, tensorrt, tensorrt_rtx"):
        load_check(str(tmp_path / "out"))
    with pytest.raises(BackendError, match="needs an NVIDIA GPU: asked for number 1, torch sees 0"):
        load_check(str(tmp_path / "out"), device="cuda:1")


@pytest.mark.usefixtures("without_gpu")
def test_a_pack_without_an_engine_names_the_command(
    pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # a GPU as far as the engine cache is concerned: nothing gets as far as running on it
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))

    with pytest.raises(
        BackendError, match=r"no engine of tensorrt_rtx .* on sm89 .*: safeguard export tensorrt /"
    ):
        load_check(str(pack.folder), device="tensorrt_rtx")


def test_an_engine_of_an_altered_model_is_not_found(pack: Pack, cache: EngineCache, tmp_path: Path) -> None:
    first = build_pack_engine(pack, flavour="tensorrt_rtx", cache=cache)
    changed = rude_pack(tmp_path / "changed")
    model = (changed / "model.onnx").read_bytes()
    (changed / "model.onnx").write_bytes(model + b"\x3a\x00")  # an empty field more: the same graph
    fields = pack.manifest.model_dump(mode="json", exclude={"files"})
    seal(changed, fields)

    second = build_pack_engine(resolve(changed), flavour="tensorrt_rtx", cache=cache)
    assert second.spec.model != first.spec.model


def test_a_new_threshold_needs_no_new_engine(pack: Pack, cache: EngineCache, tmp_path: Path) -> None:
    first = build_pack_engine(pack, flavour="tensorrt_rtx", cache=cache)
    changed = rude_pack(tmp_path / "changed")
    fields = pack.manifest.model_dump(mode="json", exclude={"files"})
    seal(changed, {**fields, "operating_points": {"standard": {"toxic": 0.9}}})

    again = resolve(changed)
    assert again.digest != pack.digest
    assert build_pack_engine(again, flavour="tensorrt_rtx", cache=cache).spec == first.spec


@pytest.mark.usefixtures("without_gpu")
def test_an_engine_is_not_made_of_an_engine(pack: Pack, cache: EngineCache, tmp_path: Path) -> None:
    export(pack, tmp_path / "out", cache)

    with pytest.raises(ExportError, match=r"engines are built of .onnx files, its model is model.engine"):
        build_pack_engine(resolve(tmp_path / "out"), flavour="tensorrt_rtx", cache=cache)


def test_a_folder_that_is_there_is_kept(pack: Pack, cache: EngineCache, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()

    with pytest.raises(FileExistsError):
        export(pack, tmp_path / "out", cache)
