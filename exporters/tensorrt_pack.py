"""Model packs for TensorRT: the engine of a pack in the cache, or a pack of its own that holds the engine."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from safeguard.backends import open_backend
from safeguard.backends.engine_cache import Entry
from safeguard.backends.engine_spec import SPEC_SUFFIX, Buckets
from safeguard.backends.tensorrt_flavours import fits_architecture
from safeguard.errors import ExportError, SafeguardError
from safeguard.exporters import parity
from safeguard.exporters.fp8 import quantised
from safeguard.exporters.tensorrt import build_engine, weight_files
from safeguard.exporters.writing import new_folder, refuse_existing
from safeguard.manifest import ExportRecord, Manifest
from safeguard.packs import Pack, seal

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

ENGINE_NAME = "model.engine"
TOLERANCES: Mapping[str, float] = {
    "float32": 5e-3,
    "float16": 2e-2,
    "bfloat16": 5e-2,
    "float8": 2e-1,
    "int8": 2e-1,
}
"""Largest difference from the ONNX file, relative to the largest value; float32 products run as TF32."""
UNCHECKED = "The engine was built where it cannot run, so it was not compared with its model."


def buckets_for(pack: Pack, buckets: Buckets) -> Buckets:
    """The buckets, with no length beyond the pack's window, which is the last one."""
    window = pack.manifest.window
    if window is None:
        return buckets
    lengths = (*(size for size in buckets.lengths if size < window.tokens), window.tokens)
    return Buckets(lengths=lengths, batches=buckets.batches)


def build_pack_engine(
    pack: Pack, *, buckets: Buckets | None = None, model: Path | None = None, **options: Any
) -> Entry:
    """The engine of a pack's ONNX file, built into the cache where it is missing; options as `build_engine`.

    model: another ONNX file of the same model, such as a quantised one.
    Raises ExportError for a pack whose model is no ONNX file, and what `build_engine` raises.
    """
    _refuse_engines(pack)
    return build_engine(model or pack.model, buckets=buckets_for(pack, buckets or Buckets()), **options)


def export_tensorrt(
    pack: Pack,
    out: Path,
    *,
    buckets: Buckets | None = None,
    fp8: Path | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Manifest:
    """Writes a pack with the engine in the place of the ONNX file; it loads wherever the GPU is the engine's.

    fp8: texts or pictures to calibrate an fp8 engine on (`safeguard.exporters.fp8.calibration_rows`).
    Where the engine can run, it is compared with the ONNX file first. Raises what `build_pack_engine` raises,
    ParityError, FileExistsError for an `out` that is there; with fp8 what `safeguard.exporters.fp8` raises.
    """
    refuse_existing(out, overwrite=overwrite)
    _refuse_engines(pack)
    with quantised(pack, fp8) if fp8 is not None else nullcontext(pack.model) as model:
        entry = build_pack_engine(pack, buckets=buckets, model=model, **options)
    if fp8 is not None and entry.spec.precision != "float8":
        raise ExportError(
            pack.manifest.name, f"modelopt found nothing in it for fp8; its engine is {entry.spec.precision}"
        )
    agreed = compare_engine(pack, entry, options.get("device", 0)) if runs_here(entry, options) else []
    beside = PurePosixPath(pack.manifest.model.file).parent
    left = {pack.manifest.model.file, *(str(beside / name) for name in weight_files(pack.model))}
    with new_folder(out, overwrite=overwrite) as folder:
        for name in pack.manifest.files:
            if name not in left:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(pack.path(name), folder / name)
        (folder / ENGINE_NAME).write_bytes(entry.engine)
        (folder / (ENGINE_NAME + SPEC_SUFFIX)).write_text(entry.spec.to_json(), encoding="utf-8")
        return seal(folder, _fields(pack, entry, agreed))


def _refuse_engines(pack: Pack) -> None:
    if pack.model.suffix != ".onnx":
        raise ExportError(
            pack.manifest.name, f"engines are built of .onnx files, its model is {pack.model.name}"
        )


def runs_here(entry: Entry, options: Mapping[str, Any]) -> bool:
    """Whether the GPU at hand is one that the engine runs on."""
    try:
        from safeguard.backends.tensorrt_lanes import cuda_device, present_architecture

        present = present_architecture(cuda_device(options.get("device", 0)))
    except SafeguardError:  # no torch, or no such GPU
        return False
    return fits_architecture(entry.spec.architecture, present)


def compare_engine(pack: Pack, entry: Entry, device: int) -> list[parity.Parity]:
    """Runs the engine and the ONNX file it was built of, in onnxruntime, on the same seeded inputs."""
    model, on_gpu = pack.manifest.model, f"{entry.spec.flavour}:{device}"
    reference = open_backend(
        pack.model, inputs=model.inputs, outputs=model.outputs, external=pack.manifest.files
    )
    candidate = open_backend(entry.path, inputs=model.inputs, outputs=model.outputs, device=on_gpu)
    return parity.compare(
        reference,
        candidate,
        _batches(pack, entry),
        tolerance=TOLERANCES.get(entry.spec.precision, 2e-2),
        decide=lambda values: values > 0,
        advice="build it with another precision, or keep the ONNX file",
    )


def _batches(pack: Pack, entry: Entry) -> Sequence[Mapping[str, NDArray[Any]]]:
    """At batch 1 and 5; for texts at several lengths, the longest bucket among them."""
    spec = entry.spec
    if spec.buckets.lengths:
        tokenizer = Tokenizer.from_file(str(pack.path("tokenizer.json")))
        names = [one.name for one in spec.inputs]
        return parity.token_batches(tokenizer.get_vocab_size(), spec.buckets.lengths[-1], inputs=names)
    if len(spec.inputs) != 1:
        raise ExportError(pack.manifest.name, "parity is checked for one image input")
    image = spec.inputs[0]
    return parity.pixel_batches([int(size) for size in image.axes[1:]], input=image.name)


def _fields(pack: Pack, entry: Entry, agreed: Sequence[parity.Parity]) -> dict[str, Any]:
    fields = pack.manifest.model_dump(mode="json", exclude={"files"})
    record = ExportRecord(
        exporter=entry.spec.flavour,
        versions={entry.spec.flavour: entry.spec.version},
        source=pack.manifest.export.source if pack.manifest.export else pack.manifest.name,
        opset=pack.manifest.export.opset if pack.manifest.export else None,
        flavour="decomposed",
        dtype=entry.spec.precision,
        parity=tuple(one.record() for one in agreed),
    )
    return {
        **fields,
        "model": {**fields["model"], "file": ENGINE_NAME},
        "precision": entry.spec.precision,
        "export": record.model_dump(mode="json"),
        "notes": pack.manifest.notes if agreed else f"{pack.manifest.notes} {UNCHECKED}".strip(),
    }
