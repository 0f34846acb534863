"""TensorRT and its twin TensorRT-RTX behind one face; every difference of version and flavour is here.

What differs, and where:

* TensorRT 10 builds a strongly typed network only when asked, TensorRT 11 has no other kind and takes the
  same flag without effect (and has no FP16, BF16, INT8 flags any more): `network_flags` always asks, and
  number types come from the ONNX file alone.
* TensorRT builds for the GPU at hand and times its kernels, so there is a timing cache. RTX needs no GPU to
  build: its engines hold for every GPU from Ampere on, or for those named, and are finished on the GPU when
  first run. Its timing cache does nothing, is deprecated, and makes it look for a GPU: `has_timing_cache`.
* RTX needs a builder flag so that no memory is allocated while a CUDA graph is captured, and its kernels for
  the shape at hand must be compiled before: `prepare_builder`, `create_context`.
* TensorRT's lean and dispatch runtimes are never imported: without a driver they end the process.
"""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from safeguard.backends.engine_spec import Flavour
from safeguard.errors import BackendError, MissingExtra

log = logging.getLogger(__name__)

FLAVOURS: tuple[Flavour, ...] = get_args(Flavour)
PORTABLE = "portable"
"""Architecture of a TensorRT-RTX engine that names no GPU: Ampere (sm80) and later."""
_OLDEST = (10, 3)  # strongly typed networks with profiles of int64 inputs and device_memory_size_v2
_PLACE = re.compile(r"^\[[^\]]*\] *")  # where in their sources
_ARCHITECTURE = re.compile(r"sm\d{2,3}[a-z]?")


@dataclass(frozen=True, slots=True)
class TensorRT:
    """One of the two modules, with its differences."""

    name: Flavour
    module: Any

    @property
    def version(self) -> str:
        """Full version of the library; engines hold for this one only."""
        return str(self.module.__version__)

    @property
    def is_rtx(self) -> bool:
        """Whether it is TensorRT-RTX."""
        return self.name == "tensorrt_rtx"

    @property
    def has_timing_cache(self) -> bool:
        """Whether measured kernel times are kept between builds."""
        return not self.is_rtx

    def network_flags(self) -> int:
        """Flags of `create_network`: strongly typed."""
        return 1 << int(self.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)

    def prepare_builder(self, config: Any, architectures: Sequence[str]) -> None:
        """Set what the flavour needs. Raises BackendError for architectures that it cannot build for."""
        if self.is_rtx:
            config.set_flag(self.module.BuilderFlag.REQUIRE_USER_ALLOCATION)
            if architectures:
                config.num_compute_capabilities = len(architectures)
                for index, name in enumerate(architectures):
                    config.set_compute_capability(self._capability(name), index)
        elif architectures:
            raise BackendError(
                f"tensorrt builds for the GPU at hand, not for {', '.join(architectures)}; "
                "leave the architecture out, or take tensorrt_rtx"
            )

    def create_context(self, engine: Any) -> Any:
        """An execution context whose scratch memory is given to it from outside."""
        strategy = self.module.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self.is_rtx:
            return engine.create_execution_context(strategy)
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        config.dynamic_shapes_kernel_specialization_strategy = (
            self.module.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        return engine.create_execution_context(config)

    def is_capturable(self, context: Any, stream: int) -> bool:
        """Whether a run of this context can be captured as a CUDA graph."""
        ask = getattr(context, "is_stream_capturable", None)  # RTX 1.2 and later; TensorRT always can
        return bool(ask(stream)) if ask else True

    def logger(self) -> Any:
        """A logger that passes messages on to ours and keeps the errors in `errors`."""
        return _logger(self.module)

    def deserialize(self, engine: bytes) -> tuple[Any, Any]:
        """(runtime, engine); the runtime must live as long as the engine. Raises BackendError."""
        logger = self.logger()
        runtime = self.module.Runtime(logger)
        made = runtime.deserialize_cuda_engine(engine)
        if made is None:  # no exception: the reason was only logged
            why = "; ".join(logger.errors[:2]) or "no reason was given"
            raise BackendError(f"{self.name} {self.version} cannot load the engine on this machine: {why}")
        return runtime, made

    def _capability(self, name: str) -> Any:
        known = sorted(n for n in self.module.ComputeCapability.__members__ if n.startswith("SM"))
        if name.upper() not in known:
            raise BackendError(
                f"{self.name} {self.version} cannot build for {name!r}; known: {', '.join(known).lower()}, "
                "or none for Ampere and later"
            )
        return self.module.ComputeCapability.__members__[name.upper()]


def load_flavour(name: str) -> TensorRT:
    """The module of that name. Raises MissingExtra when it is not there, BackendError when it is broken."""
    if name not in FLAVOURS:
        raise BackendError(f"flavour must be {' or '.join(FLAVOURS)}, got {name!r}")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as exc:
        if exc.name != name:
            raise BackendError(f"{name} is only half installed: {exc}") from exc
        raise _not_installed(name) from exc
    except (ImportError, OSError) as exc:  # the libraries are missing, or built for another system
        raise BackendError(f"{name} is installed but cannot be imported: {exc}") from exc
    found = tuple(int(n) for n in re.findall(r"\d+", str(module.__version__))[:2])
    if name == "tensorrt" and found < _OLDEST:
        raise BackendError(f"tensorrt must be 10.3 or later, found {module.__version__}")
    return TensorRT(name, module)


def architecture_of(capability: tuple[int, int]) -> str:
    """The GPU architecture of a compute capability: sm90 for (9, 0)."""
    return f"sm{capability[0]}{capability[1]}"


def join_architectures(names: Sequence[str]) -> str:
    """The architecture of an engine for these GPUs: "sm86+sm89"; portable for none."""
    for name in names:
        if not _ARCHITECTURE.fullmatch(name):
            raise BackendError(f"architecture must be written as sm89, got {name!r}")
    return "+".join(sorted(set(names))) or PORTABLE


def fits_architecture(built: str, present: str) -> bool:
    """Whether an engine built for `built` runs on a GPU of architecture `present`, such as sm89."""
    return present in built.split("+") or (built == PORTABLE and int(present[2:]) >= 80)


def _not_installed(name: str) -> MissingExtra:
    if name == "tensorrt_rtx":
        return MissingExtra(name, "tensorrt-rtx")
    # no extra of ours: its libraries come from NVIDIA's own index, which a lock file cannot resolve offline
    return MissingExtra(name, "", command="pip install tensorrt-cu13")


def _logger(module: Any) -> Any:
    levels = {
        "INTERNAL_ERROR": logging.WARNING,
        "ERROR": logging.WARNING,  # what matters is raised too
        "WARNING": logging.DEBUG,
        "INFO": logging.DEBUG,
        "VERBOSE": 0,
    }

    class Logger(module.ILogger):  # type: ignore[misc]  # a class of the untyped library
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            level = levels.get(severity.name, logging.DEBUG)
            if level >= logging.WARNING:
                self.errors.append(_PLACE.sub("", " ".join(message.split())))
                log.debug("tensorrt: %s", self.errors[-1])
            elif level:
                log.debug("tensorrt: %s", message)

    return Logger()
