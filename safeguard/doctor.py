"""What is installed, what is missing and the command that mends it. Imports no model library."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from safeguard import registry, smollm2
from safeguard.errors import DISTRIBUTION, PackError, PackNotFound
from safeguard.packs import is_offline
from safeguard.policy import PRESETS, Policy

State = Literal["ok", "missing", "problem", "note"]

_OPTIONAL: tuple[str, ...] = (
    *("onnxruntime", "onnxruntime-gpu", "torch", "transformers", "diffusers", "accelerate", "safetensors"),
    *("onnx", "onnxscript", "huggingface-hub", "gguf", "tensorrt-rtx", "tensorrt-cu13", "tensorrt-cu12"),
)
_REQUIREMENT = re.compile(r"([\w.-]+)\s*(?:\[([\w,\s.-]*)\])?\s*([^;]*?)\s*(?:;\s*(.*))?")
_EXTRA = re.compile(r"extra\s*==\s*['\"]([\w.-]+)['\"]")
_PROVIDERS = "import json, onnxruntime; print(json.dumps(onnxruntime.get_available_providers()))"
_CUDA = """
import json, torch
print(json.dumps([torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]))
"""
_VERSION = "import json, {0}; print(json.dumps([{0}.__version__]))"
_PATIENCE_S = 120.0
_HUB_PATIENCE_S = 3.0


@dataclass(frozen=True, slots=True)
class Item:
    """One thing looked at. needed: the preset `standard` cannot judge text without it."""

    area: str
    name: str
    state: State
    detail: str
    remedy: str | None = None
    needed: bool = False


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything that was looked at, in order."""

    items: tuple[Item, ...]

    @property
    def ready(self) -> bool:
        """Whether the preset `standard` can judge text here."""
        return not any(item.needed and item.state in ("missing", "problem") for item in self.items)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {"ready": self.ready, "items": [asdict(item) for item in self.items]}


def examine(*, offline: bool = False, deep: bool = False) -> Diagnosis:
    """Look at everything. offline: do not try the hub. deep: import torch, in a process of its own."""
    parts = (
        _python(),
        _core(),
        _extras(),
        _runtime(),
        _torch(deep=deep),
        _tensorrt(deep=deep),
        _presets(),
        _language_model(),
    )
    return Diagnosis(tuple(item for part in (*parts, _hub(offline=offline)) for item in part))


# --- libraries ------------------------------------------------------------------------------------


def version_of(distribution: str) -> str | None:
    """Version of an installed distribution, None where it is not; imports nothing of it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def satisfies(version: str, specifiers: str) -> bool:
    """Whether a version meets comma-separated specifiers; only >=, <, ==, <= and > are looked at."""
    compared = {
        ">=": lambda a, b: a >= b,
        "<=": lambda a, b: a <= b,
        "==": lambda a, b: a == b,
        ">": lambda a, b: a > b,
        "<": lambda a, b: a < b,
    }
    for part in filter(None, (s.strip() for s in specifiers.split(","))):
        sign = next((s for s in compared if part.startswith(s)), None)
        if sign is None or "*" in part:
            continue
        if not compared[sign](*_aligned(version, part.removeprefix(sign))):
            return False
    return True


def _aligned(*versions: str) -> list[tuple[int, ...]]:
    """Release numbers of equal length: 1.2 and 1.2.3+cpu become (1, 2, 0) and (1, 2, 3)."""
    numbers = [
        [int(n) for n in (re.match(r"\d+(\.\d+)*", v.strip()) or [""])[0].split(".") if n] for v in versions
    ]
    longest = max(map(len, numbers))
    return [tuple(n + [0] * (longest - len(n))) for n in numbers]


def requirements() -> dict[str, list[tuple[str, str]]]:
    """Extra name ("" for the core) -> (distribution, specifiers), with our extras inside extras resolved."""
    lines = importlib.metadata.requires(DISTRIBUTION) or []
    direct: dict[str, list[tuple[str, str]]] = {"": []}
    inner: dict[str, list[str]] = {}
    for line in lines:
        found = _REQUIREMENT.fullmatch(line.strip())
        if found is None:
            continue
        name, extras, specifiers, marker = found.groups()
        extra = (_EXTRA.search(marker or "") or ["", ""])[1]
        direct.setdefault(extra, [])
        if name == DISTRIBUTION:
            inner.setdefault(extra, []).extend(e.strip() for e in (extras or "").split(","))
        else:
            direct[extra].append((name, specifiers))

    def resolved(extra: str, above: tuple[str, ...] = ()) -> list[tuple[str, str]]:
        below = [e for e in inner.get(extra, []) if e not in above]
        return [r for e in below for r in resolved(e, (*above, extra))] + direct.get(extra, [])

    return {extra: list(dict.fromkeys(resolved(extra))) for extra in direct}


def _python() -> Iterator[Item]:
    from safeguard import __version__

    yield Item("python", "safeguard", "ok", __version__)
    yield Item(
        "python", "python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    )
    for name in _OPTIONAL:
        version = version_of(name)
        if version is not None:
            yield Item("python", name, "ok", version)


def _core() -> Iterator[Item]:
    try:
        wanted = requirements()[""]
    except importlib.metadata.PackageNotFoundError:
        remedy = "pip install -e ."
        yield Item("core", DISTRIBUTION, "problem", "not installed, only lying here", remedy, needed=True)
        return
    for name, specifiers, version in _unmet(wanted):
        state: State = "missing" if version is None else "problem"
        yield Item(
            "core", name, state, _against(version, specifiers), f"pip install {DISTRIBUTION}", needed=True
        )
    if not any(_unmet(wanted)):
        yield Item("core", "dependencies", "ok", f"all {len(wanted)} installed")


def _extras() -> Iterator[Item]:
    try:
        known = requirements()
    except importlib.metadata.PackageNotFoundError:
        return
    for extra, wanted in known.items():
        if not extra:
            continue
        unmet = list(_unmet(wanted))
        remedy = f"pip install '{DISTRIBUTION}[{extra}]'"
        if not unmet:
            yield Item("extras", extra, "ok", ", ".join(name for name, _ in wanted))
        elif extra == "gpu" and version_of("onnxruntime") is not None:
            remedy = f"pip uninstall onnxruntime && {remedy}"
            yield Item(
                "extras", extra, "note", "not together with the extra onnx, which is installed", remedy
            )
        elif extra == "onnx" and version_of("onnxruntime-gpu") is not None:
            yield Item("extras", extra, "note", "not needed: onnxruntime-gpu is installed")
        else:
            detail = "; ".join(f"{name} {_against(version, spec)}" for name, spec, version in unmet)
            yield Item("extras", extra, "missing", detail, remedy)


def _unmet(wanted: list[tuple[str, str]]) -> Iterator[tuple[str, str, str | None]]:
    for name, specifiers in wanted:
        version = version_of(name)
        if version is None or not satisfies(version, specifiers):
            yield name, specifiers, version


def _against(version: str | None, specifiers: str) -> str:
    return "is not installed" if version is None else f"is {version}, must be {specifiers}"


# --- runtimes -------------------------------------------------------------------------------------


def _runtime() -> Iterator[Item]:
    builds = [name for name in ("onnxruntime", "onnxruntime-gpu") if version_of(name) is not None]
    if not builds:
        remedy = f"pip install '{DISTRIBUTION}[onnx]'"
        yield Item("runtime", "onnxruntime", "missing", "no build is installed", remedy, needed=True)
        return
    if len(builds) == 2:
        detail = "onnxruntime and onnxruntime-gpu overwrite each other's files; keep one"
        remedy = f"pip uninstall onnxruntime onnxruntime-gpu && pip install '{DISTRIBUTION}[gpu]'"
        yield Item("runtime", "onnxruntime", "problem", detail, remedy, needed=True)
    providers, why = _ask(_PROVIDERS)
    if providers is None:
        remedy = f"pip install --force-reinstall {builds[0]}"
        yield Item("runtime", "onnxruntime", "problem", f"cannot be imported: {why}", remedy, needed=True)
        return
    yield Item("runtime", "providers", "ok", ", ".join(providers))
    if shutil.which("nvidia-smi") and "CUDAExecutionProvider" not in providers:
        remedy = f"pip uninstall onnxruntime && pip install '{DISTRIBUTION}[gpu]'"
        yield Item("runtime", "gpu", "note", "an NVIDIA driver is here, but onnxruntime has no CUDA", remedy)


def _torch(*, deep: bool) -> Iterator[Item]:
    if version_of("torch") is None:
        return
    if not deep:
        yield Item("runtime", "torch", "note", "not imported, so its GPUs are not known (--deep asks)")
        return
    devices, why = _ask(_CUDA)
    if devices is None:
        remedy = "pip install --force-reinstall torch"
        yield Item("runtime", "torch", "problem", f"cannot be imported: {why}", remedy)
    else:
        yield Item("runtime", "torch", "ok", "GPUs: " + (", ".join(devices) or "none"))


def _tensorrt(*, deep: bool) -> Iterator[Item]:
    """TensorRT and its twin: whether each is there, and with `deep` whether its libraries load."""
    sources = {
        "tensorrt_rtx": (("tensorrt-rtx",), f"pip install '{DISTRIBUTION}[tensorrt-rtx]'"),
        "tensorrt": (("tensorrt-cu13", "tensorrt-cu12", "tensorrt"), "pip install tensorrt-cu13"),
    }
    for name, (distributions, remedy) in sources.items():
        version = next(filter(None, map(version_of, distributions)), None)
        if version is None:
            if shutil.which("nvidia-smi"):
                yield Item(
                    "runtime", name, "note", "an NVIDIA driver is here, but it is not installed", remedy
                )
        elif not deep:
            yield Item("runtime", name, "note", f"{version}, not imported (--deep tries)")
        elif (found := _ask(_VERSION.format(name)))[0] is None:
            yield Item("runtime", name, "problem", f"cannot be imported: {found[1]}", remedy)
        else:
            yield Item(
                "runtime", name, "ok", f"{version}; engines: safeguard export tensorrt MODEL --flavour {name}"
            )


def _ask(code: str) -> tuple[list[str] | None, str]:
    """What a line of Python prints as JSON in a process of its own; None and the reason where it fails."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=_PATIENCE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        return None, type(exc).__name__
    if done.returncode:
        return None, (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    try:
        return [str(value) for value in json.loads(done.stdout.splitlines()[-1])], ""
    except (ValueError, IndexError, TypeError):
        return None, "its answer cannot be read"


# --- models ---------------------------------------------------------------------------------------


def _presets() -> Iterator[Item]:
    """The checks that the presets name, each once; those of `standard` for text are needed."""
    users: dict[str, set[str]] = {}
    optional: dict[str, bool] = {}
    for name in PRESETS:
        for surface, spec, is_optional in _specs(Policy.preset(name)):
            users.setdefault(spec, set()).add(f"{name} {surface}")
            optional[spec] = optional.get(spec, True) and is_optional
    for spec, places in users.items():
        needed = not optional[spec] and bool(places & {"standard t2i", "standard llm", "standard text"})
        yield _check_item(spec, needed=needed, optional=optional[spec])
    refiner = (Policy.preset("standard").refiner or "").partition(":")[0]
    if refiner:
        yield _refiner_item(refiner)


def _specs(policy: Policy) -> Iterator[tuple[str, str, bool]]:
    """(surface, check, whether it is optional) for all that a policy names."""
    rules = {
        "t2i": policy.input.t2i,
        "llm": policy.input.llm,
        "text": policy.output.text,
        "image": policy.output.image,
    }
    for surface, rule in rules.items():
        yield from ((surface, spec, False) for spec in rule.checks)
        yield from ((surface, spec, True) for spec in rule.optional_checks)


def _check_item(spec: str, *, needed: bool, optional: bool) -> Item:
    kind = spec.partition(":")[0]
    if ":" in spec and kind in registry.names("checks"):
        return Item("models", spec, "ok", "a registered check", needed=needed)
    try:
        pack = _offline_pack(spec)
    except PackNotFound as exc:
        command = re.search(r"pip install [^()]+", str(exc))
        remedy = command[0] if command else f"pip install --force-reinstall {DISTRIBUTION}"
        detail = "no place has it: " + "; ".join(exc.places)
        return Item("models", spec, "note" if optional else "missing", detail, remedy, needed)
    except PackError as exc:
        return Item(
            "models", spec, "problem", str(exc), f"pip install --force-reinstall {DISTRIBUTION}", needed
        )
    manifest = pack.manifest
    return Item(
        "models", spec, "ok", f"{manifest.kind} {manifest.version}, verified, in {pack.folder}", needed=needed
    )


def _offline_pack(name: str) -> Any:
    """The pack of that name without asking the hub, whatever the environment says."""
    from safeguard.packs import resolve

    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        return resolve(name)
    finally:
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before


def _refiner_item(name: str) -> Item:
    try:
        factory = registry.load("refiners", name)
    except (ImportError, KeyError) as exc:
        remedy = f"pip install --force-reinstall {DISTRIBUTION}"
        return Item("models", f"refiner {name}", "problem", f"cannot be loaded: {exc}", remedy, needed=True)
    if getattr(factory, "__module__", "") == "safeguard.refiners.shipped":
        return _shipped_refiner(name)
    return Item("models", f"refiner {name}", "ok", "registered", needed=True)


def _shipped_refiner(name: str) -> Item:
    """Which refiner `default` is here, and why; the span softener, its stand-in, is always there."""
    from safeguard.refiners import shipped

    state, item = shipped.look(), f"refiner {name}"
    if state.why is not None:
        detail = f"span-softener in place of {shipped.NAME}: {' '.join(state.why.split())}"
        return Item("models", item, "note", detail, state.remedy, needed=True)
    what = f"{shipped.NAME} {state.version}"
    if state.built is None:
        detail = f"{what}, built when a target is first guarded, which takes about a minute, or now"
        return Item("models", item, "note", detail, shipped.BUILD, needed=True)
    return Item("models", item, "ok", f"{what}, built in {state.built}", needed=True)


def _language_model() -> Iterator[Item]:
    name = "embedded language model"
    try:
        path = smollm2.find()
    except PackNotFound:
        yield Item("models", name, "missing", "only the demo needs it", smollm2.INSTALL)
    else:
        yield Item("models", name, "ok", f"{path.name}, in {path.parent}")


# --- the hub --------------------------------------------------------------------------------------


def _hub(*, offline: bool) -> Iterator[Item]:
    folder = cache_folder(os.environ)
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    if os.access(existing, os.W_OK):
        yield Item("hub", "cache", "ok", f"{folder} can be written to")
    else:
        yield Item("hub", "cache", "problem", f"{folder} cannot be written to", "export HF_HOME=FOLDER")
    if is_offline():
        yield Item("hub", "network", "note", "HF_HUB_OFFLINE is set: nothing is downloaded")
    elif offline:
        yield Item("hub", "network", "note", "not tried")
    elif os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        yield Item("hub", "network", "note", "not tried: a proxy is set")
    else:
        yield _reached()


def cache_folder(environment: Mapping[str, str]) -> Path:
    """Where the hub client keeps what it downloads, worked out without importing it."""
    if "HF_HUB_CACHE" in environment:
        return Path(environment["HF_HUB_CACHE"]).expanduser()
    cache = Path(environment.get("XDG_CACHE_HOME", "~/.cache"))
    return Path(environment.get("HF_HOME", str(cache / "huggingface"))).expanduser() / "hub"


def _reached() -> Item:
    """Whether the hub that the hub client would ask takes a connection."""
    try:
        from huggingface_hub.constants import ENDPOINT
    except ImportError:
        return Item("hub", "network", "note", "not tried: huggingface-hub is not installed")
    parts = urlsplit(ENDPOINT)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        with socket.create_connection((parts.hostname or "", port), timeout=_HUB_PATIENCE_S):
            return Item("hub", "network", "ok", f"{parts.hostname} answers")
    except OSError as exc:
        return Item("hub", "network", "note", f"{parts.hostname} does not answer ({type(exc).__name__})")
