"""What the steps of an exported Triton repository share: the pack beside them, calls of the model, errors.

Runs inside Triton's python backend, from the copy that `safeguard.exporters.triton` puts into a repository,
so it needs numpy and nothing of the package that is not copied too.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from safeguard.checks.readout import Readout

if TYPE_CHECKING:
    from numpy.typing import NDArray

Arrays = Mapping[str, "NDArray[Any]"]
log = logging.getLogger(__name__)

PACK_FOLDER = "pack"
MANIFEST = "safeguard.json"
MANIFEST_DIGEST = "manifest_sha256"


@dataclass(frozen=True)
class StepPack:
    """The part of a model pack that lies beside a step, and the parameters of the step's config.pbtxt."""

    folder: Path
    manifest: Mapping[str, Any]
    parameters: Mapping[str, str]

    @classmethod
    def open(cls, args: Mapping[str, str]) -> StepPack:
        """From what Triton hands to `initialize`. Raises ValueError where the manifest was altered."""
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
        folder = Path(args["model_repository"]) / args["model_version"] / PACK_FOLDER
        raw = (folder / MANIFEST).read_bytes()
        if hashlib.sha256(raw).hexdigest() != parameters[MANIFEST_DIGEST]:
            raise ValueError(f"{MANIFEST} is not the file that was exported; export the pack again")
        return cls(folder, json.loads(raw), parameters)

    def read(self, name: str) -> bytes:
        """A file of the pack, proven. Raises ValueError where it was altered."""
        content = (self.folder / name).read_bytes()
        if hashlib.sha256(content).hexdigest() != self.manifest["files"][name]:
            raise ValueError(f"{name} is not the file that the pack lists; export the pack again")
        return content

    def flag(self, name: str) -> bool:
        """A parameter that is true or false; ValueError for anything else."""
        value = self.parameters[name]
        if value not in ("true", "false"):
            raise ValueError(f"parameter {name} must be true or false, got {value!r}")
        return value == "true"

    def number(self, name: str) -> int:
        """A parameter that is a whole number, 0 or more; ValueError for anything else."""
        value = self.parameters[name]
        if not (value.isascii() and value.isdecimal()):
            raise ValueError(f"parameter {name} must be a whole number, got {value!r}")
        return int(value)


class ModelCalls:
    """Calls of the repository's model from inside Triton, many at once so that its batcher can join them.

    utils: the module `triton_python_backend_utils`.
    """

    def __init__(self, utils: Any, pack: StepPack) -> None:
        self._utils, self._model = utils, pack.parameters["model"]
        self._outputs = list(pack.manifest["model"]["outputs"])[:1]

    async def __call__(self, runs: Sequence[Mapping[str, NDArray[Any]]]) -> list[NDArray[np.float32]]:
        """The model's first output for each run. Raises RuntimeError, with Triton's message."""
        return list(await asyncio.gather(*(self._one(run) for run in runs)))

    async def _one(self, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        utils, options = self._utils, {}
        if hasattr(utils, "PreferredMemory"):  # without it outputs of a model on a GPU may stay there
            options["preferred_memory"] = utils.PreferredMemory(utils.TRITONSERVER_MEMORY_CPU, 0)
        request = utils.InferenceRequest(
            model_name=self._model,
            requested_output_names=self._outputs,
            inputs=[utils.Tensor(name, array) for name, array in arrays.items()],
            **options,
        )
        response = await request.async_exec()
        if response.has_error():
            raise RuntimeError(f"{self._model} failed: {response.error().message()}")
        found: NDArray[np.float32] = utils.get_output_tensor_by_name(response, self._outputs[0]).as_numpy()
        return found


def backend_utils() -> Any:
    """The module `triton_python_backend_utils`, which only Triton's python backend has."""
    import triton_python_backend_utils

    return triton_python_backend_utils


def worst_rows(scores: NDArray[np.float64], owners: NDArray[np.int64], count: int) -> NDArray[np.float32]:
    """The largest score of each label over the rows of each item: (row, label) to (item, label).

    Raises ValueError for what is no probability, NaN among them, and for an item without rows: a caller who
    compares with a threshold would let it pass.
    """
    if count and set(owners.tolist()) != set(range(count)):
        raise ValueError(f"there must be rows for each of {count} items")
    out = np.zeros((count, scores.shape[1]), np.float32)
    for item in range(count):
        out[item] = scores[owners == item].max(axis=0)  # keeps NaN
    if not ((out >= 0) & (out <= 1)).all():
        raise ValueError("the model gave scores that are no probabilities")
    return out


def readout_of(manifest: Mapping[str, Any]) -> Readout:
    """What turns the logits of a pack's model into scores."""
    return Readout(
        manifest["labels"],
        ignored=manifest["ignored_labels"],
        activation=manifest["activation"],
        temperatures=manifest["temperatures"],
        biases=manifest["biases"],
        heads=manifest["heads"],
    )


def answered(utils: Any, requests: Sequence[Any], work: Callable[[Any], Arrays]) -> list[Any]:
    """A response to each request; what goes wrong with one is its own answer, and the others get theirs."""
    found = []
    for request in requests:
        try:
            found.append(_answer(utils, work(request)))
        except Exception as exc:
            found.append(_refusal(utils, exc))
    return found


async def answered_at_once(
    utils: Any, requests: Sequence[Any], work: Callable[[Any], Awaitable[Arrays]]
) -> list[Any]:
    """As `answered`, with all requests on their way together."""

    async def one(request: Any) -> Any:
        try:
            return _answer(utils, await work(request))
        except Exception as exc:
            return _refusal(utils, exc)

    return list(await asyncio.gather(*(one(request) for request in requests)))


def _refusal(utils: Any, exc: Exception) -> Any:
    """An error response that says what was wrong with a request."""
    log.error("request failed: error=%s", type(exc).__name__)
    return utils.InferenceResponse(output_tensors=[], error=utils.TritonError(f"{type(exc).__name__}: {exc}"))


def tensor_of(utils: Any, request: Any, name: str) -> NDArray[Any]:
    """An input of a request as an array."""
    found: NDArray[Any] = utils.get_input_tensor_by_name(request, name).as_numpy()
    return found


def _answer(utils: Any, arrays: Arrays) -> Any:
    return utils.InferenceResponse(output_tensors=[utils.Tensor(n, a) for n, a in arrays.items()])
