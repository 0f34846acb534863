"""Model packs as repositories for NVIDIA Triton: the model, a step before and one behind it, an ensemble.

For a pack `toxic` there are four models. Clients ask the ensemble `toxic`: bytes in, a score per label out.

* `toxic_tokenizer` or `toxic_pixels` (python) makes the rows that the model sees: all readings of a text, cut
  into windows; all views of a picture.
* `toxic_model` (onnxruntime or TensorRT) runs rows; Triton's dynamic batcher joins those of several callers.
* `toxic_scores` (python) calls it through Triton's own scripting interface and takes the worst row of each
  item, with the pack's temperatures and biases.

The model is no step of the ensemble itself: an ensemble passes each tensor on once and whole. The number of
rows differs from item to item and may exceed what the model takes at once, rows of unlike length should not
be padded to the longest, and those of an int8 model must each have a run of their own.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

import safeguard
from safeguard.backends.engine_spec import SPEC_SUFFIX, EngineSpec
from safeguard.checks.readout import Readout
from safeguard.errors import ExportError, MissingExtra
from safeguard.exporters import triton_config as config
from safeguard.exporters.triton_calls import MANIFEST, MANIFEST_DIGEST, PACK_FOLDER
from safeguard.exporters.triton_readme import readme
from safeguard.exporters.triton_vendor import copy_closure
from safeguard.exporters.writing import new_folder, refuse_existing
from safeguard.images import MAX_FRAMES
from safeguard.packs import Pack, file_digest
from safeguard.runtime.buckets import LENGTHS

RECORD_NAME = "safeguard-triton.json"
"""Says what a repository was made of; a folder without it is never replaced."""
KINDS = ("text_classifier", "image_classifier", "clip_heads")
Device = Literal["cpu", "gpu"]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Serving:
    """How Triton runs the model.

    instances: copies of it, each with one run at a time. max_rows: largest batch; preferred_rows: those that
    the batcher waits for, at most queue_delay_us. threads: CPU threads of a run, 0: the runtime's choice.
    views: whether texts are scored in all readings (see `safeguard.text`). max_windows: most in one reading.
    """

    device: Device = "cpu"
    instances: int = 1
    max_rows: int = 64
    preferred_rows: tuple[int, ...] = (8, 16, 32, 64)
    queue_delay_us: int = 200
    threads: int = 0
    views: bool = True
    max_windows: int = 512
    max_frames: int = MAX_FRAMES

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "gpu"):
            raise ValueError(f"device must be cpu or gpu, got {self.device!r}")
        if min(self.instances, self.max_rows, self.max_windows, self.max_frames) < 1:
            raise ValueError("instances, max_rows, max_windows and max_frames must be 1 or more")
        if min(self.queue_delay_us, self.threads) < 0:
            raise ValueError("queue_delay_us and threads must be 0 or more")
        if any(rows < 1 for rows in self.preferred_rows):
            raise ValueError(f"preferred_rows must be 1 or more, got {self.preferred_rows}")


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """What Triton must know of a model file. rows: largest batch, 0 where the batch axis is fixed."""

    file: str
    platform: str
    inputs: tuple[config.Tensor, ...]
    outputs: tuple[config.Tensor, ...]
    rows: int
    isolated: bool
    profiles: int = 0


def export_triton(
    pack: Pack,
    out: Path,
    *,
    serving: Serving | None = None,
    overwrite: bool = False,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Writes a model repository for a pack of texts or pictures, or nothing. Returns its record.

    Raises ExportError for a pack that Triton cannot serve, PackError for one that was altered,
    FileExistsError for an `out` that is there.
    """
    refuse_existing(out, overwrite=overwrite, marker=RECORD_NAME)
    serving = serving or Serving()
    manifest = pack.manifest
    if manifest.kind not in KINDS:
        raise ExportError(manifest.name, f"its kind is {manifest.kind}; Triton serves {', '.join(KINDS)}")
    say(f"checking the files of {manifest.name}")
    pack.verify()
    plan = plan_model(pack, serving)
    with new_folder(out, overwrite=overwrite, marker=RECORD_NAME) as folder:
        say("writing the model")
        _write_model(pack, plan, serving, folder / f"{manifest.name}_model")
        say("writing the steps around it")
        steps = _write_steps(pack, plan, serving, folder)
        record = {
            "format": 1,
            "safeguard": safeguard.__version__,
            "pack": {"name": manifest.name, "version": manifest.version, "digest": pack.digest},
            "labels": list(labels_of(pack)),
            "operating_points": manifest.operating_points,
            "models": [manifest.name, *steps, f"{manifest.name}_model"],
            "device": serving.device,
            "precision": manifest.precision,
            "isolated": plan.isolated,
        }
        (folder / "README.md").write_text(readme(pack, record), encoding="utf-8")
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        record["files"] = {p.relative_to(folder).as_posix(): file_digest(p) for p in files}
        (folder / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def labels_of(pack: Pack) -> tuple[str, ...]:
    """Names of the scores, in order."""
    if pack.manifest.kind == "clip_heads":
        from safeguard.checks.clip_heads import HEADS_NAME, read_heads

        return tuple(head.category for head in read_heads(HEADS_NAME, pack.read(HEADS_NAME)))
    return Readout.of(pack.manifest).labels


def plan_model(pack: Pack, serving: Serving) -> ModelPlan:
    """Reads from the model file what its config must say. Raises ExportError where Triton cannot run it."""
    isolated = pack.manifest.precision.startswith("int8") and serving.device == "cpu"
    if pack.manifest.precision.startswith("int8") and serving.device == "gpu":
        raise ExportError(
            pack.manifest.name,
            "its int8 graph is for CPUs; export it as float16, or serve it with device cpu",
        )
    match pack.model.suffix:
        case ".onnx":
            return _onnx_plan(pack, serving, isolated=isolated)
        case ".engine" | ".plan":
            return _engine_plan(pack, serving)
        case suffix:
            raise ExportError(pack.manifest.name, f"Triton runs .onnx and .engine files here, not {suffix}")


def _onnx_plan(pack: Pack, serving: Serving, *, isolated: bool) -> ModelPlan:
    try:
        import onnx
    except ImportError as exc:
        raise MissingExtra("onnx", "export") from exc
    graph = onnx.load_model(pack.model, load_external_data=False).graph
    weights = {one.name for one in graph.initializer}
    inputs = [_onnx_tensor(pack, one) for one in graph.input if one.name not in weights]
    outputs = [_onnx_tensor(pack, one) for one in graph.output]
    _refuse_names(pack, [t.name for t in inputs], [t.name for t in outputs])
    batches = {t.dims[0] for t in (*inputs, *outputs)}
    free = batches == {-1}
    if not free and {t.dims[0] for t in inputs} != {1}:
        raise ExportError(pack.manifest.name, f"its batch axis must be free or 1, its tensors have {batches}")
    cut = slice(1, None) if free else slice(None)
    rows = (1 if isolated else serving.max_rows) if free else 0
    return ModelPlan(
        file="model.onnx",
        platform="onnxruntime_onnx",
        inputs=tuple(t.cut(cut) for t in inputs),
        outputs=tuple(t.cut(cut) for t in outputs),
        rows=rows,
        isolated=isolated,
    )


def _onnx_tensor(pack: Pack, value: Any) -> config.Tensor:
    import onnx

    kind = value.type.tensor_type
    if not kind.shape.dim:
        raise ExportError(pack.manifest.name, f"tensor {value.name!r} has no shape with a batch axis")
    dims = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim)
    name = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)).name
    return config.Tensor(value.name, config.triton_type(name), dims)


def _engine_plan(pack: Pack, serving: Serving) -> ModelPlan:
    name = pack.manifest.name
    spec = EngineSpec.read(pack.model.with_name(pack.model.name + SPEC_SUFFIX))
    if spec.flavour != "tensorrt":
        raise ExportError(name, f"Triton runs engines of tensorrt, this one is of {spec.flavour}")
    if serving.device != "gpu":
        raise ExportError(name, "a TensorRT engine runs on a GPU; serve it with device gpu")
    _refuse_names(pack, [t.name for t in spec.inputs], [t.name for t in spec.outputs])
    inputs, outputs = (
        tuple(
            config.Tensor(
                t.name, config.triton_type(t.dtype), tuple(-1 if isinstance(a, str) else a for a in t.axes)
            )
            for t in tensors
        )
        for tensors in (spec.inputs, spec.outputs)
    )
    return ModelPlan(
        file="model.plan",
        platform="tensorrt_plan",
        inputs=tuple(t.cut(slice(1, None)) for t in inputs),
        outputs=tuple(t.cut(slice(1, None)) for t in outputs),
        rows=min(serving.max_rows, spec.buckets.batches[-1]),
        isolated=False,
        profiles=len(spec.buckets.profiles()),
    )


def _refuse_names(pack: Pack, inputs: list[str], outputs: list[str]) -> None:
    model = pack.manifest.model
    if set(model.inputs) != set(inputs) or not set(model.outputs) <= set(outputs):
        raise ExportError(
            pack.manifest.name,
            f"its model has {', '.join(inputs)} -> {', '.join(outputs)}, its manifest says "
            f"{', '.join(model.inputs)} -> {', '.join(model.outputs)}",
        )


def _write_model(pack: Pack, plan: ModelPlan, serving: Serving, folder: Path) -> None:
    (folder / "1").mkdir(parents=True)
    content = pack.read(pack.manifest.model.file)
    (folder / "1" / plan.file).write_bytes(content)
    beside = PurePosixPath(pack.manifest.model.file).parent
    for name in pack.manifest.files:  # weights beside the graph, which it names
        path = PurePosixPath(name)
        if name == pack.manifest.model.file or not path.is_relative_to(beside):
            continue
        if str(path.relative_to(beside)).encode() in content:
            target = folder / "1" / path.relative_to(beside)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(pack.path(name), target)
    lengths = (lengths_of(pack, plan) or (16,)) if any(-1 in t.dims for t in plan.inputs) else ()
    warmups = config.warmups(plan.inputs, lengths, tuple(dict.fromkeys((1, max(plan.rows, 1)))))
    for length in lengths:
        (folder / "warmup").mkdir(exist_ok=True)
        for tensor in plan.inputs:
            ones = np.ones(length, config.numpy_type(tensor.type))
            (folder / "warmup" / config.warmup_file(tensor, length)).write_bytes(ones.tobytes())
    text = config.model_config(f"{pack.manifest.name}_model", plan, serving, warmups, _facts(pack))
    (folder / "config.pbtxt").write_text(text, encoding="utf-8")


def lengths_of(pack: Pack, plan: ModelPlan) -> tuple[int, ...]:
    """Lengths to which windows are padded, so that the batcher can join them; none where they stay bare."""
    window = pack.manifest.window
    if window is None or plan.isolated:
        return ()
    return (*(size for size in LENGTHS if size < window.tokens), window.tokens)


def _facts(pack: Pack) -> dict[str, str]:
    """Parameters of every config: which pack this is."""
    return {
        "pack_name": pack.manifest.name,
        "pack_version": pack.manifest.version,
        "pack_digest": pack.digest,
        "model_sha256": pack.manifest.files[pack.manifest.model.file],
    }


def _write_steps(pack: Pack, plan: ModelPlan, serving: Serving, folder: Path) -> list[str]:
    """The two python steps and the ensemble; gives the steps' names."""
    name, is_text = pack.manifest.name, pack.manifest.kind == "text_classifier"
    first = f"{name}_tokenizer" if is_text else f"{name}_pixels"
    second = f"{name}_scores"
    module = "safeguard.exporters." + ("triton_text_steps" if is_text else "triton_image_steps")
    classes = ("TextTokens", "TextScores") if is_text else ("ImagePixels", "ImageScores")
    settings = {
        "model": f"{name}_model",
        "views": _word(serving.views),
        "isolated": _word(plan.isolated),
        "max_rows": str(max(plan.rows, 1)),
        "max_windows": str(serving.max_windows),
        "max_frames": str(serving.max_frames),
        "lengths": ",".join(map(str, lengths_of(pack, plan))),
    }
    labels = labels_of(pack)
    writers: Mapping[str, str] = {
        first: config.rows_config(first, pack.manifest, settings | _proof(pack)),
        second: config.scores_config(second, pack.manifest, len(labels), settings | _proof(pack)),
        name: config.ensemble_config(
            name, pack.manifest, (first, second), len(labels), _facts(pack) | {"labels": json.dumps(labels)}
        ),
    }
    for step, text in writers.items():
        (folder / step / "1").mkdir(parents=True)
        (folder / step / "config.pbtxt").write_text(text, encoding="utf-8")
    (folder / name / "1" / ".keep").touch()  # Triton wants a version folder, and an empty one is easily lost
    for step, made in zip((first, second), classes, strict=True):
        _write_step(pack, folder / step / "1", module, made)
    return [first, second]


def _write_step(pack: Pack, folder: Path, module: str, made: str) -> None:
    copy_closure(module, folder)
    launcher = (
        f'"""{made} of safeguard, from the copy beside this file."""\n\n'
        "import sys\nfrom pathlib import Path\n\n"
        "sys.path.insert(0, str(Path(__file__).resolve().parent))\n\n"
        f"from {module} import {made} as TritonPythonModel  # noqa: E402, F401\n"
    )
    (folder / "model.py").write_text(launcher, encoding="utf-8")
    (folder / PACK_FOLDER).mkdir()
    (folder / PACK_FOLDER / MANIFEST).write_bytes(_manifest(pack))
    for name in ("tokenizer.json", "heads.npz"):
        if name in pack.manifest.files:
            (folder / PACK_FOLDER / name).write_bytes(pack.read(name))


def _manifest(pack: Pack) -> bytes:
    """The manifest as the steps read it, with every field."""
    return json.dumps(pack.manifest.model_dump(mode="json"), indent=2).encode()


def _proof(pack: Pack) -> dict[str, str]:
    return _facts(pack) | {MANIFEST_DIGEST: hashlib.sha256(_manifest(pack)).hexdigest()}


def _word(flag: bool) -> str:
    return "true" if flag else "false"
