"""The texts of Triton's config.pbtxt files; needs nothing of Triton."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safeguard.manifest import Manifest

if TYPE_CHECKING:
    from safeguard.exporters.triton import ModelPlan, Serving

_TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "int8": "TYPE_INT8",
    "uint8": "TYPE_UINT8",
    "bool": "TYPE_BOOL",
}
_ISOLATED = (
    "one window a run: an int8 model scales its activations over the whole run, so a neighbour would\n"
    "# change the scores, and with them a verdict. For more throughput raise\n"
    "# the instance count, never max_batch_size"
)


@dataclass(frozen=True, slots=True)
class Tensor:
    """Name, type and dims of a tensor as Triton writes them; -1 where a dim is free."""

    name: str
    type: str
    dims: tuple[int, ...]

    def cut(self, part: slice) -> Tensor:
        """The same with some of its dims, as without the batch axis."""
        return Tensor(self.name, self.type, self.dims[part])


def triton_type(numpy_name: str) -> str:
    """Triton's word for a number type; ValueError for one that it does not take."""
    if numpy_name not in _TYPES:
        raise ValueError(f"Triton takes {', '.join(_TYPES)}, got {numpy_name}")
    return _TYPES[numpy_name]


def numpy_type(triton_name: str) -> str:
    """Name in numpy of one of Triton's types."""
    return next(name for name, word in _TYPES.items() if word == triton_name)


def warmup_file(tensor: Tensor, length: int) -> str:
    """Name of the file with ones for a tensor of free length."""
    return f"ones_{numpy_type(tensor.type)}_{length}"


def warmups(inputs: Sequence[Tensor], lengths: Sequence[int], batches: Sequence[int]) -> str:
    """`model_warmup` entries: every length with every batch, so that no caller meets a shape first."""
    parts = []
    for length in lengths or (0,):
        for batch in batches:
            fields = [f'  name: "rows_{batch}_length_{length}"' if length else f'  name: "rows_{batch}"']
            fields.append(f"  batch_size: {batch}")
            for tensor in inputs:
                dims = ", ".join(str(length if d == -1 else d) for d in tensor.dims)
                data = (
                    f"input_data_file: {_text(warmup_file(tensor, length))}"
                    if length
                    else "random_data: true"
                )
                fields.append(
                    f"  inputs {{\n    key: {_text(tensor.name)}\n"
                    f"    value {{ data_type: {tensor.type} dims: [ {dims} ] {data} }}\n  }}"
                )
            parts.append("model_warmup {\n" + "\n".join(fields) + "\n}\n")
    return "".join(parts)


def model_config(name: str, plan: ModelPlan, serving: Serving, warmup: str, facts: Mapping[str, str]) -> str:
    """Of the model itself: batching, instances, warm-up."""
    kind = "KIND_GPU" if serving.device == "gpu" else "KIND_CPU"
    if plan.isolated:
        head = f"# {_ISOLATED}\nmax_batch_size: {plan.rows}\n"
    elif plan.rows == 0:
        head = "# the graph's batch axis is fixed, so rows go one by one\nmax_batch_size: 0\n"
    else:
        head = f"max_batch_size: {plan.rows}\n" + _batching(plan.rows, serving)
    profiles = ""
    if plan.profiles > 1:  # one a length; Triton takes the best for each run
        profiles = f" profile: [ {', '.join(_text(str(i)) for i in range(plan.profiles))} ]"
    numbers = dict(facts)
    if serving.device == "cpu" and plan.platform == "onnxruntime_onnx":
        threads = serving.threads or (
            1 if plan.isolated else 0
        )  # runs of one row gain from going side by side
        numbers |= {"intra_op_thread_count": str(threads), "inter_op_thread_count": "1"}
    return (
        f"name: {_text(name)}\nplatform: {_text(plan.platform)}\n"
        f"default_model_filename: {_text(plan.file)}\n{head}"
        f"{_tensors('input', plan.inputs)}{_tensors('output', plan.outputs)}"
        f"instance_group [ {{ kind: {kind} count: {serving.instances}{profiles} }} ]\n"
        f"{_VERSION}{_parameters(numbers)}{warmup}"
    )


def rows_config(name: str, manifest: Manifest, parameters: Mapping[str, str]) -> str:
    """Of the step that makes rows of items."""
    if manifest.kind == "text_classifier":
        inputs = [Tensor("TEXT", "TYPE_STRING", (-1,))]
    else:
        inputs = [Tensor("IMAGE", "TYPE_STRING", (-1,))]
    return _python(name, inputs, row_tensors(manifest), parameters)


def scores_config(name: str, manifest: Manifest, labels: int, parameters: Mapping[str, str]) -> str:
    """Of the step that runs the model on rows and reads it out."""
    outputs = [Tensor("SCORES", "TYPE_FP32", (-1, labels))]
    return _python(name, row_tensors(manifest), outputs, parameters)


def row_tensors(manifest: Manifest) -> list[Tensor]:
    """What passes from the first step to the second."""
    own = [Tensor("OWNERS", "TYPE_INT32", (-1,)), Tensor("COUNT", "TYPE_INT32", (1,))]
    if manifest.image is None:
        return [Tensor("INPUT_IDS", "TYPE_INT64", (-1,)), Tensor("LENGTHS", "TYPE_INT32", (-1,)), *own]
    size = manifest.image.size
    shape = (size, size, 3) if manifest.image.layout == "NHWC" else (3, size, size)
    return [Tensor("PIXELS", "TYPE_FP32", (-1, *shape)), *own]


def ensemble_config(
    name: str, manifest: Manifest, steps: tuple[str, str], labels: int, facts: Mapping[str, str]
) -> str:
    """Of the ensemble that clients ask."""
    item = Tensor("TEXT" if manifest.image is None else "IMAGE", "TYPE_STRING", (-1,))
    scores = Tensor("SCORES", "TYPE_FP32", (-1, labels))
    between = [tensor.name for tensor in row_tensors(manifest)]
    first = _step(steps[0], [item.name], between)
    second = _step(steps[1], between, [scores.name])
    return (
        f'name: {_text(name)}\nplatform: "ensemble"\n'
        "# no batch axis: the items of a request are its only one, and their rows differ in number\n"
        f"max_batch_size: 0\n{_tensors('input', [item])}{_tensors('output', [scores])}"
        f"ensemble_scheduling {{\n{first}{second}}}\n{_VERSION}{_parameters(facts)}"
    )


_VERSION = "version_policy { specific { versions: [ 1 ] } }\n"


def _batching(rows: int, serving: Serving) -> str:
    preferred = sorted({size for size in serving.preferred_rows if size <= rows})
    wanted = f"  preferred_batch_size: [ {', '.join(map(str, preferred))} ]\n" if preferred else ""
    return (
        f"dynamic_batching {{\n{wanted}  max_queue_delay_microseconds: {serving.queue_delay_us}\n"
        "  preserve_ordering: false\n}\n"
    )


def _python(
    name: str, inputs: Iterable[Tensor], outputs: Iterable[Tensor], parameters: Mapping[str, str]
) -> str:
    return (
        f'name: {_text(name)}\nbackend: "python"\nmax_batch_size: 0\n'
        f"{_tensors('input', inputs)}{_tensors('output', outputs)}"
        f"instance_group [ {{ kind: KIND_CPU count: 2 }} ]\n{_VERSION}{_parameters(parameters)}"
    )


def _step(name: str, inputs: Sequence[str], outputs: Sequence[str]) -> str:
    maps = "".join(
        f"      {what} {{ key: {_text(tensor)} value: {_text(tensor)} }}\n"
        for what, tensors in (("input_map", inputs), ("output_map", outputs))
        for tensor in tensors
    )
    return f"  step [\n    {{\n      model_name: {_text(name)}\n      model_version: -1\n{maps}    }}\n  ]\n"


def _tensors(what: str, tensors: Iterable[Tensor]) -> str:
    rows = (
        f"  {{ name: {_text(t.name)} data_type: {t.type} dims: [ {', '.join(map(str, t.dims))} ] }}"
        for t in tensors
    )
    return f"{what} [\n" + ",\n".join(rows) + "\n]\n"


def _parameters(values: Mapping[str, str]) -> str:
    return "".join(
        f"parameters {{ key: {_text(key)} value {{ string_value: {_text(value)} }} }}\n"
        for key, value in values.items()
    )


def _text(value: str) -> str:
    """A string in protobuf's text format, whose escapes for these characters are those of JSON."""
    if any(ord(c) < 32 for c in value):
        raise ValueError(f"a name or value must not have control characters, got {value!r}")
    return json.dumps(value, ensure_ascii=False)
