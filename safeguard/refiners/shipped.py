"""`prompt-refiner-s`, the refiner that ships with the package: an adapter for the embedded language model.

The names `default` and `prompt-refiner-s` of a policy's `refiner` lead here. It runs on onnxruntime-genai
with 8-bit weights. The file for that is built once, from adapter and base model, into the user's cache: when
a target is guarded or by `Guard.warmup()`, or ahead with `safeguard export genai prompt-refiner-s`; never
while a prompt waits. `prompt-refiner-s:torch` runs it on torch, eight times slower; nothing else does.

Where it cannot run, `default` is the span softener, and says so; `prompt-refiner-s` raises.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from weakref import WeakValueDictionary

from safeguard import smollm2
from safeguard.errors import MissingExtra, PackError, PackNotFound, RefinerError, SafeguardError
from safeguard.locks import ForkLock
from safeguard.manifest import MANIFEST_NAME
from safeguard.packs import resolve
from safeguard.refiners.causal_lm import CausalLMRefiner
from safeguard.refiners.in_turn import InTurn
from safeguard.refiners.language_model import ADAPTER_CONFIG, EMBEDDED_BASE
from safeguard.refiners.softener import SpanSoftener
from safeguard.types import Refiner, RefineRequest

log = logging.getLogger(__name__)

NAME = "prompt-refiner-s"
BUILD = f"safeguard export genai {NAME}"
"""The command that builds it ahead of time."""
Runtime = Literal["genai", "torch"]
_SERVING: dict[Runtime, tuple[tuple[str, str], ...]] = {  # module -> the extra that brings it
    "genai": (("onnxruntime_genai", "genai"), ("jinja2", "genai"), ("filelock", "genai")),
    "torch": (("torch", "torch"), ("transformers", "torch"), ("peft", "peft")),
}
_BUILDING = (
    *(("torch", "torch"), ("transformers", "torch"), ("peft", "peft"), ("gguf", "embedded")),
    *(("onnx", "export"), ("onnx_ir", "export")),
)
_CALL_S, _GENERATION_S = 17.0, 12.0
"""The last generation of a call begins within the first and takes the second at most; presets: 30 s."""

_opened: WeakValueDictionary[tuple[str, Runtime], CausalLMRefiner] = WeakValueDictionary()
"""Models that guards of this process use: it is one model for all of them, 270 MB."""
_opening = ForkLock()


@dataclass(frozen=True, slots=True)
class State:
    """What can be said of the shipped refiner here without loading it.

    built: where its file lies. why: what keeps it from running, None where nothing does; then it runs, after
    building where `built` is None. remedy: the command that mends it.
    """

    version: str | None = None
    built: Path | None = None
    why: str | None = None
    remedy: str | None = None


def look(source: str | Path = NAME, *, cache: Path | None = None) -> State:
    """Whether the refiner can run here on onnxruntime-genai, and what is missing. Loads and imports no model.

    source: the pack's name, or the folder of an adapter in its place. cache: the user's own by default.
    """
    try:
        folder, version = _folder(source)
        for module, extra in _SERVING["genai"]:
            if importlib.util.find_spec(module) is None:
                raise MissingExtra(module, extra=extra)
        _need_base(folder)
        from safeguard.exporters.genai import place_of  # a layer above, and only to know the place

        built = place_of(folder, cache=cache)
        if (built / MANIFEST_NAME).is_file():
            return State(version, built)
        for module, extra in _BUILDING:
            if importlib.util.find_spec(module) is None:
                raise MissingExtra(module, extra=extra)
        return State(version)
    except SafeguardError as exc:
        return State(why=str(exc), remedy=_command(exc))


class ShippedRefiner:
    """The adapter on the embedded model, with the span softener as its second try.

    required: without the model it raises; else the span softener serves in its place, which is logged, stands
    in `why` and shows in `name`. source: the pack's name or an adapter's folder.
    """

    def __init__(
        self,
        source: str | Path = NAME,
        *,
        required: bool = False,
        runtime: Runtime = "genai",
        cache: Path | None = None,
    ) -> None:
        if runtime not in _SERVING:
            raise ValueError(f"{NAME} runs on genai or torch, got {runtime!r}")
        self._source, self._required, self._runtime, self._cache = source, required, runtime, cache
        self._softener = SpanSoftener()
        self._model: InTurn | None = None
        self._lock = ForkLock()
        self._waits = False  # for being built
        self.why: str | None = "it was not opened yet"
        """What keeps the model from being used; None while it is."""

    @property
    def name(self) -> str:
        """Of what is in use: `prompt-refiner-s+span-softener`, or `span-softener` alone."""
        return self._in_use.name

    @property
    def attempts(self) -> int:
        """How often a prompt may be rewritten until it passes."""
        return getattr(self._in_use, "attempts", 1)

    @property
    def _in_use(self) -> Refiner:
        return self._model or self._softener

    def __call__(self, requests: Sequence[RefineRequest], /) -> list[str]:
        """One text per request. Raises RefinerError when the model is required and was not built yet."""
        if self._model is None and self._required:
            raise RefinerError(f"{NAME} cannot be used: {self.why}")
        if self._waits:
            self._waits = False  # said once, not for every prompt
            log.warning("refiner in use: %s; %s is not: %s", self._softener.name, NAME, self.why)
        return list(self._in_use(requests))

    def open(self) -> ShippedRefiner:
        """Itself, with the model loaded where it can be at once; builds nothing.

        Raises PackNotFound, PackError or MissingExtra when it is required and something is missing.
        """
        with self._lock:
            if self._model is None:
                self._try(build=False)
        return self

    def prepare(self) -> None:
        """Builds the model where that was not done yet, which takes about a minute, and loads it.

        Raises as `open`, and ExportError or ParityError when it is required and cannot be built.
        """
        with self._lock:
            if self._model is None:
                self._try(build=True)

    def _try(self, *, build: bool) -> None:
        try:
            folder, _ = _folder(self._source)
            for module, extra in _SERVING[self._runtime]:
                if importlib.util.find_spec(module) is None:
                    raise MissingExtra(module, extra=extra)
            _need_base(folder)
            model = self._ready(folder, build=build)
        except (SafeguardError, OSError) as exc:  # OSError: a full disk, a cache that cannot be written to
            if self._required:
                raise
            self._stand_in(exc)
            return
        self._waits = model is None
        if model is None:
            self.why = f"it is not built yet; run: {BUILD}, or call Guard.warmup()"
        else:
            at_once = 1 if self._runtime == "genai" else 8
            self._model = InTurn(model, self._softener, at_once=at_once, limit_s=_CALL_S)
            self.why = None
            log.info("refiner in use: %s", self.name)

    def _stand_in(self, exc: Exception) -> None:
        why = " ".join(str(exc).split()) if isinstance(exc, SafeguardError) else type(exc).__name__
        if why == self.why:
            return  # said already
        self.why, self._waits = why, False
        log.warning("refiner in use: %s; %s is not: %s", self._softener.name, NAME, why)

    def _ready(self, folder: Path, *, build: bool) -> CausalLMRefiner | None:
        """The loaded model; None where it would have to be built first and must not be."""
        if self._runtime == "torch":
            return _open(folder, "torch")
        from safeguard.exporters.genai import cached_genai, place_of  # a layer above: it is what builds

        built = place_of(folder, cache=self._cache)
        if (built / MANIFEST_NAME).is_file():
            try:
                return _open(built, "genai")
            except PackError as exc:
                log.warning("a built model cannot be used: folder=%s error=%s", built.name, exc)
        if not build:
            return None
        log.warning("building %s for this computer, once; it takes about a minute", NAME)
        return _open(cached_genai(folder, cache=self._cache, say=_say).folder, "genai")


def default() -> ShippedRefiner:
    """The refiner of the presets: the shipped one where it can run here, else the span softener."""
    return ShippedRefiner().open()


def required(runtime: str = "genai") -> ShippedRefiner:
    """The shipped refiner or an error; `prompt-refiner-s:torch` runs it on torch."""
    return ShippedRefiner(required=True, runtime=runtime).open()  # type: ignore[arg-type]  # checked there


def _folder(source: str | Path) -> tuple[Path, str | None]:
    """Where the adapter lies, its digests checked where it is a pack, and its version."""
    folder = Path(source)
    if isinstance(source, str) and source == NAME or (folder / MANIFEST_NAME).is_file():
        pack = resolve(source if source == NAME else folder).expect("refiner")
        return pack.folder, pack.manifest.version
    if not (folder / ADAPTER_CONFIG).is_file():
        raise PackNotFound(str(source), [f"the folder {folder}, which has no {ADAPTER_CONFIG}"])
    return folder, None


def _need_base(folder: Path) -> None:
    """Raises PackNotFound, with the command that installs it, where the embedded base model is not here."""
    try:
        settings = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        base = settings["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise PackError(f"{folder / ADAPTER_CONFIG} names no base model") from exc
    if base == EMBEDDED_BASE:
        smollm2.find()


def _open(folder: Path, runtime: Runtime) -> CausalLMRefiner:
    """The model in a folder, opened once in a process for as long as some guard uses it."""
    key = (str(folder.resolve()), runtime)
    with _opening:
        found = _opened.get(key)
        if found is None:
            found = CausalLMRefiner.load(
                folder, runtime=runtime, timeout_s=_GENERATION_S, whole_only=True, name=NAME
            )
            _opened[key] = found
    return found


def _say(step: str) -> None:
    log.info("%s: %s", NAME, step)


def _command(exc: SafeguardError) -> str | None:
    _, found, command = str(exc).partition("run: ")
    return command.strip() or None if found else None
