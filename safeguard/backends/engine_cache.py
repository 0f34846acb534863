"""Built TensorRT engines in the user's cache, keyed by all that they depend on.

An engine runs what is in it, so an entry is used only when its description is the one asked for, its SHA-256
is the one described, and nobody else could have written it. Anything else counts as absent.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safeguard import smollm2
from safeguard.backends.engine_spec import SPEC_SUFFIX, EngineKey, EngineSpec
from safeguard.errors import BackendError

log = logging.getLogger(__name__)

_ENGINE = "model.engine"
_SPEC = _ENGINE + SPEC_SUFFIX
_KEY_LENGTH = 32  # hex digits of the key's digest in a folder's name


@dataclass(frozen=True, slots=True)
class Entry:
    """An engine whose digest was just seen to be right. `folder` holds it; `engine` are its bytes."""

    spec: EngineSpec
    engine: bytes
    folder: Path

    @property
    def path(self) -> Path:
        """The engine's file; its description lies beside it."""
        return self.folder / _ENGINE


class EngineCache:
    """A folder of engines. Safe for several threads and processes: an entry appears whole or not at all."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or smollm2.cache_folder() / "engines"

    def get(self, key: EngineKey) -> Entry | None:
        """The engine of that key, None when there is none that can be trusted."""
        return _read(self._place(key), key)

    def find(self, wanted: Callable[[EngineSpec], bool]) -> Entry | None:
        """The engine built last among those `wanted` by their descriptions; None when there is none."""
        found: list[tuple[str, str, Path]] = []
        for folder in self.folder.glob("tensorrt*") if self.folder.is_dir() else ():
            spec = _described(folder)
            if spec is not None and wanted(spec):
                found.append((spec.built, folder.name, folder))
        for _, _, folder in sorted(found, reverse=True):
            entry = _read(folder, None)
            if entry is not None:
                return entry
        return None

    def get_or_build(self, key: EngineKey, build: Callable[[], bytes], *, rebuild: bool = False) -> Entry:
        """The engine of that key, built when there is none to trust, by one process at a time.

        rebuild: build it whatever is there. Whoever waited for another process's build takes that one.
        Raises what `build` raises, and then leaves nothing behind; BackendError where nothing can be written.
        """
        asked = time.time_ns()
        if not rebuild and (entry := self.get(key)) is not None:
            return entry
        with self.locked(key.digest):
            place = self._place(key)
            entry = self.get(key)
            if entry is not None and (not rebuild or _written(place) >= asked):
                return entry
            return self._put(key, build())

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """One process and thread at a time for that name; the system frees it when its holder dies."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle = os.open(self.folder / f".{name[:_KEY_LENGTH]}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as exc:
            raise BackendError(
                f"the engine cache {self.folder} cannot be written to: {exc.strerror}"
            ) from exc
        try:
            _lock(handle)
            yield
        finally:
            os.close(handle)  # which unlocks it

    def _place(self, key: EngineKey) -> Path:
        return self.folder / f"{key.flavour}-{key.architecture}-{key.digest[:_KEY_LENGTH]}"

    def _put(self, key: EngineKey, engine: bytes) -> Entry:
        """Writes an entry in the place of what may be there; the lock of the key must be held."""
        spec = EngineSpec(
            **{name: getattr(key, name) for name in EngineKey.model_fields},
            engine=hashlib.sha256(engine).hexdigest(),
            size_bytes=len(engine),
            built=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )
        place = self._place(key)
        new, stale = (Path(tempfile.mkdtemp(prefix=".", dir=self.folder)) for _ in range(2))  # 0700
        try:
            for name, data in ((_ENGINE, engine), (_SPEC, spec.to_json().encode())):
                (new / name).write_bytes(data)
                (new / name).chmod(0o600)
            if place.exists():
                place.rename(stale / "entry")
            new.rename(place)
        except OSError as exc:
            raise BackendError(f"the engine cannot be kept in {self.folder}: {exc.strerror}") from exc
        finally:
            for folder in (new, stale):
                shutil.rmtree(folder, ignore_errors=True)
        return Entry(spec, engine, place)


def read_engine(path: Path, *, content: bytes | None = None) -> tuple[EngineSpec, bytes]:
    """An engine file and the description beside it. Raises BackendError when the two do not belong together.

    content: what the file holds, where it was read and proven already.
    """
    spec = EngineSpec.read(path.with_name(path.name + SPEC_SUFFIX))
    if content is None:
        try:
            content = path.read_bytes()
        except OSError as exc:
            raise BackendError(f"the engine {path.name} cannot be read: {exc.strerror}") from exc
    found = hashlib.sha256(content).hexdigest()
    if found != spec.engine:
        raise BackendError(
            f"the engine {path.name} was altered: sha256 is {found[:12]}..., its description says "
            f"{spec.engine[:12]}...; build it again with safeguard export tensorrt"
        )
    return spec, content


def is_ours(path: Path) -> bool:
    """Whether only this user, or the administrator, can have written it; always where files have no owner."""
    if not hasattr(os, "geteuid"):
        return True
    status = path.lstat()
    writable = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return status.st_uid in (os.geteuid(), 0) and not writable and not stat.S_ISLNK(status.st_mode)


def _described(folder: Path) -> EngineSpec | None:
    """What an entry says of itself; None where it is broken or may be somebody else's work."""
    try:
        if not all(is_ours(path) for path in (folder, folder / _SPEC, folder / _ENGINE)):
            log.warning("engine cache entry not used, others can write to it: entry=%s", folder.name)
            return None
        return EngineSpec.read(folder / _SPEC)
    except (OSError, BackendError):
        return None


def _read(folder: Path, key: EngineKey | None) -> Entry | None:
    if not folder.is_dir():
        return None
    spec = _described(folder)
    if spec is None or (key is not None and EngineKey.of(spec) != key):
        log.warning("engine cache entry not used, its description does not fit: entry=%s", folder.name)
        return None
    try:
        spec, engine = read_engine(folder / _ENGINE)
    except BackendError:
        log.warning("engine cache entry not used, its digest is wrong: entry=%s", folder.name)
        return None
    return Entry(spec, engine, folder)


def _written(folder: Path) -> int:
    return (folder / _SPEC).stat().st_mtime_ns


if sys.platform == "win32":  # pragma: no cover
    import msvcrt

    def _lock(handle: int) -> None:
        while True:
            try:
                msvcrt.locking(handle, msvcrt.LK_LOCK, 1)  # tries for ten seconds
            except OSError:
                continue
            return

else:
    import fcntl

    def _lock(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX)
