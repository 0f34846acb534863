from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from safeguard.backends.engine_cache import EngineCache, Entry, read_engine
from safeguard.backends.engine_spec import Buckets, EngineKey, TensorSpec
from safeguard.errors import BackendError

KEY = EngineKey(
    flavour="tensorrt",
    version="10.9.0",
    architecture="sm90",
    model="a" * 64,
    precision="float16",
    buckets=Buckets(lengths=(8,), batches=(1,)),
    inputs=(TensorSpec(name="ids", dtype="int64", axes=("batch", "length")),),
    outputs=(TensorSpec(name="logits", dtype="float32", axes=("batch", 2)),),
)
OTHER = KEY.model_copy(update={"precision": "float32"})


def refuse() -> bytes:
    pytest.fail("an engine was built again")


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "engines")


@pytest.fixture
def entry(cache: EngineCache) -> Entry:
    return cache.get_or_build(KEY, lambda: b"engine")


def test_an_engine_is_built_once(cache: EngineCache, entry: Entry) -> None:
    assert cache.get_or_build(KEY, refuse) == entry
    assert (entry.engine, entry.path.read_bytes()) == (b"engine", b"engine")


def test_another_key_has_another_engine(cache: EngineCache, entry: Entry) -> None:
    other = cache.get_or_build(OTHER, lambda: b"other")

    assert other.folder != entry.folder
    assert cache.get(KEY) == entry


def test_an_altered_engine_is_never_loaded_but_built_again(
    cache: EngineCache, entry: Entry, caplog: pytest.LogCaptureFixture
) -> None:
    entry.path.write_bytes(b"enginE")

    with caplog.at_level(logging.WARNING):
        assert cache.get(KEY) is None
    assert "its digest is wrong" in caplog.text
    assert cache.get_or_build(KEY, lambda: b"again").engine == b"again"
    assert cache.get_or_build(KEY, refuse).engine == b"again"


def test_an_entry_that_describes_another_engine_is_built_again(cache: EngineCache, entry: Entry) -> None:
    other = cache.get_or_build(OTHER, lambda: b"other")
    description = entry.folder / "model.engine.json"
    description.write_bytes((other.folder / "model.engine.json").read_bytes())

    assert cache.get(KEY) is None


@pytest.mark.parametrize("name", ["model.engine", "model.engine.json"])
def test_half_an_entry_is_built_again(cache: EngineCache, entry: Entry, name: str) -> None:
    (entry.folder / name).unlink()

    assert cache.get(KEY) is None
    assert cache.get_or_build(KEY, lambda: b"again").engine == b"again"


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="files have no owner on this system")
@pytest.mark.parametrize("name", ["", "model.engine", "model.engine.json"])
def test_what_others_can_write_to_is_not_used(cache: EngineCache, entry: Entry, name: str) -> None:
    place = entry.folder / name
    place.chmod(place.stat().st_mode | stat.S_IWOTH)

    assert cache.get(KEY) is None
    assert cache.find(lambda _: True) is None


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="files have no owner on this system")
def test_nobody_else_can_read_or_write_an_entry(entry: Entry) -> None:
    modes = [stat.S_IMODE(p.stat().st_mode) for p in (entry.folder, entry.path)]

    assert modes == [0o700, 0o600]


def test_a_build_that_fails_leaves_nothing_behind(cache: EngineCache) -> None:
    def fail() -> bytes:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cache.get_or_build(KEY, fail)

    assert [p.name for p in cache.folder.iterdir() if not p.name.endswith(".lock")] == []
    assert cache.get_or_build(KEY, lambda: b"engine").engine == b"engine"


def test_replacing_an_entry_leaves_nothing_else_behind(cache: EngineCache, entry: Entry) -> None:
    entry.path.write_bytes(b"altered")
    cache.get_or_build(KEY, lambda: b"again")

    assert [p.name for p in cache.folder.iterdir() if not p.name.endswith(".lock")] == [entry.folder.name]


def test_it_is_built_again_when_asked_for(cache: EngineCache, entry: Entry) -> None:
    assert cache.get_or_build(KEY, lambda: b"new", rebuild=True).engine == b"new"
    assert entry.path.read_bytes() == b"new"


def test_threads_that_want_the_same_engine_build_it_once(cache: EngineCache) -> None:
    built: list[int] = []
    together = Barrier(8)

    def want(number: int) -> bytes:
        together.wait()
        return cache.get_or_build(KEY, lambda: built.append(number) or b"engine").engine  # type: ignore[func-returns-value]  # append gives None

    with ThreadPoolExecutor(8) as pool:
        engines = list(pool.map(want, range(8)))

    assert engines == [b"engine"] * 8
    assert len(built) == 1


def test_two_processes_build_it_once(cache: EngineCache, tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from safeguard.backends.engine_cache import EngineCache\n"
        "from safeguard.backends.engine_spec import EngineKey\n"
        "def build():\n    time.sleep(0.5)\n    return sys.argv[3].encode()\n"
        "key = EngineKey.model_validate_json(sys.argv[1])\n"
        "print(EngineCache(Path(sys.argv[2])).get_or_build(key, build).engine.decode())\n"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, KEY.model_dump_json(), str(cache.folder), name],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for name in ("one", "two")
    ]
    said = [process.communicate(timeout=60)[0].strip() for process in running]

    assert said in (["one", "one"], ["two", "two"])


def test_the_engine_built_last_is_found_by_its_description(cache: EngineCache, entry: Entry) -> None:
    other = cache.get_or_build(OTHER, lambda: b"other")
    description = other.folder / "model.engine.json"
    later = other.spec.model_copy(update={"built": "9999-01-01T00:00:00Z"})
    description.write_text(later.to_json(), encoding="utf-8")

    found = cache.find(lambda spec: spec.model == "a" * 64)
    assert found is not None
    assert found.engine == b"other"
    assert cache.find(lambda spec: spec.precision == "float16") == entry
    assert cache.find(lambda spec: spec.version == "11") is None


def test_an_older_engine_is_found_where_the_newer_is_altered(cache: EngineCache, entry: Entry) -> None:
    other = cache.get_or_build(OTHER, lambda: b"other")
    other.path.write_bytes(b"altered")

    assert cache.find(lambda _: True) == entry


def test_nothing_is_found_in_a_folder_that_is_not_there(cache: EngineCache) -> None:
    assert cache.find(lambda _: True) is None
    assert cache.get(KEY) is None


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(BackendError, match=r"engine cache .* cannot be written to"):
        EngineCache(tmp_path / "file" / "engines").get_or_build(KEY, lambda: b"engine")


def test_the_cache_is_in_the_users_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    assert EngineCache().folder == tmp_path / "safeguard" / "engines"


def test_an_engine_file_is_read_with_its_description(entry: Entry) -> None:
    assert read_engine(entry.path) == (entry.spec, b"engine")
    assert read_engine(entry.path, content=b"engine") == (entry.spec, b"engine")


def test_an_engine_file_that_was_altered_is_refused(entry: Entry) -> None:
    with pytest.raises(BackendError, match=r"model.engine was altered: sha256 is .* build it again"):
        read_engine(entry.path, content=b"other")


def test_an_engine_file_that_is_missing_is_named(entry: Entry) -> None:
    entry.path.unlink()

    with pytest.raises(BackendError, match=r"the engine model.engine cannot be read: No such file"):
        read_engine(entry.path)
