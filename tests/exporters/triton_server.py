"""A stand-in for Triton: runs the steps of an exported repository as its python backend does.

    python triton_server.py REPOSITORY NAME < requests.json

Run as a program of its own, since the steps bring their own copy of `safeguard`. Reads
{"requests": [[item, ...], ...]}, items in base64; prints what each request is answered, which modules were
loaded and which shapes the model was run in. Model calls go to a real onnxruntime, refused as Triton refuses
them when a batch is larger than max_batch_size.
"""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import inspect
import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort

_PARAMETER = re.compile(
    r'^parameters \{ key: ("(?:[^"\\]|\\.)*") value \{ string_value: ("(?:[^"\\]|\\.)*") \} \}$', re.M
)


class Tensor:
    def __init__(self, name: str, array: Any) -> None:
        self.name, self._array = name, array

    def as_numpy(self) -> Any:
        return self._array


class Response:
    def __init__(self, output_tensors: list[Tensor] | None = None, error: Any = None) -> None:
        self.tensors, self._error = {t.name: t for t in output_tensors or []}, error

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> Any:
        return self._error


class TritonError:
    def __init__(self, text: str) -> None:
        self._text = text

    def message(self) -> str:
        return self._text


class Server:
    """One repository."""

    def __init__(self, repository: Path) -> None:
        self.repository = repository
        self.shapes: list[tuple[int, ...]] = []
        self._sessions: dict[str, Any] = {}
        utils: Any = ModuleType("triton_python_backend_utils")
        utils.Tensor, utils.InferenceResponse, utils.TritonError = Tensor, Response, TritonError
        utils.get_input_tensor_by_name = lambda request, name: request.tensors[name]
        utils.get_output_tensor_by_name = lambda response, name: response.tensors[name]
        utils.InferenceRequest = self._request
        sys.modules["triton_python_backend_utils"] = utils

    def config(self, model: str) -> str:
        return (self.repository / model / "config.pbtxt").read_text(encoding="utf-8")

    def step(self, model: str) -> Any:
        """The step's object, initialised."""
        file = self.repository / model / "1" / "model.py"
        spec = importlib.util.spec_from_file_location(f"step_{len(sys.modules)}", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        made = module.TritonPythonModel()
        parameters = {
            json.loads(k): {"string_value": json.loads(v)} for k, v in _PARAMETER.findall(self.config(model))
        }
        made.initialize(
            {
                "model_config": json.dumps({"parameters": parameters}),
                "model_repository": str(self.repository / model),
                "model_version": "1",
            }
        )
        return made

    def ask(self, step: Any, tensors: dict[str, Any]) -> Response:
        request = SimpleNamespace(tensors={name: Tensor(name, array) for name, array in tensors.items()})
        found = step.execute([request])
        (response,) = asyncio.run(found) if inspect.iscoroutine(found) else found
        return response  # type: ignore[no-any-return]

    def _request(self, *, model_name: str, requested_output_names: list[str], inputs: list[Tensor]) -> Any:
        async def run() -> Response:
            most = int(re.search(r"^max_batch_size: (\d+)$", self.config(model_name), re.M)[1])  # type: ignore[index]
            rows = len(inputs[0].as_numpy())
            if most and rows > most:
                return Response(error=TritonError(f"batch of {rows}, max_batch_size is {most}"))
            if model_name not in self._sessions:
                path = self.repository / model_name / "1" / "model.onnx"
                options = ort.SessionOptions()
                options.intra_op_num_threads = 1
                # the fusion that our backend leaves out: it moves scores of an int8 model by 3e-5
                self._sessions[model_name] = ort.InferenceSession(
                    str(path), options, disabled_optimizers=["SkipLayerNormFusion"]
                )
            arrays = {t.name: t.as_numpy() for t in inputs}
            self.shapes.append(inputs[0].as_numpy().shape)
            values = self._sessions[model_name].run(requested_output_names, arrays)
            return Response([Tensor(n, v) for n, v in zip(requested_output_names, values, strict=True)])

        return SimpleNamespace(async_exec=run)


def main() -> None:
    server, name = Server(Path(sys.argv[1])), sys.argv[2]
    first = f"{name}_tokenizer" if (server.repository / f"{name}_tokenizer").is_dir() else f"{name}_pixels"
    before, behind = server.step(first), server.step(f"{name}_scores")
    answers: list[Any] = []
    for items in json.load(sys.stdin)["requests"]:
        raw = np.array([base64.b64decode(item) for item in items], dtype=object)
        response = server.ask(before, {"TEXT" if first.endswith("_tokenizer") else "IMAGE": raw})
        if not response.has_error():
            response = server.ask(behind, {n: t.as_numpy() for n, t in response.tensors.items()})
        failed = response.has_error()
        answers.append(
            {"error": response.error().message()}
            if failed
            else {"scores": response.tensors["SCORES"].as_numpy().tolist()}
        )
    own = sorted(n for n in sys.modules if n.split(".")[0] in ("safeguard", "pydantic", "torch"))
    where = sys.modules["safeguard"].__file__
    print(json.dumps({"answers": answers, "modules": own, "where": where, "shapes": server.shapes}))  # noqa: T201


if __name__ == "__main__":
    main()
