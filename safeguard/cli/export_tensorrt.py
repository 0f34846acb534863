"""`safeguard export tensorrt`: builds the engine of a pack or an ONNX file, before anybody asks for it."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safeguard.cli.exporting import Overwrite, sizes

if TYPE_CHECKING:
    from safeguard.backends.engine_spec import Buckets, EngineSpec


class Flavour(StrEnum):
    """Which library builds and runs the engine."""

    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt_rtx"


class Dtype(StrEnum):
    """Numbers that the engine computes with, where not those of the ONNX file."""

    fp8 = "fp8"


def tensorrt(
    model: Annotated[str, typer.Argument(help="Name or folder of a pack, or an .onnx file.")],
    flavour: Annotated[
        Flavour, typer.Option(help="tensorrt_rtx builds without a GPU, for GeForce and RTX.")
    ] = Flavour.tensorrt,
    lengths: Annotated[str | None, typer.Option(help="Length buckets, such as 16,32,64,128,256,512.")] = None,
    batches: Annotated[str | None, typer.Option(help="Batch buckets, such as 1,2,4,8,16,32,64.")] = None,
    architecture: Annotated[
        list[str] | None, typer.Option(help="GPU to build for, such as sm89 (tensorrt_rtx); may be repeated.")
    ] = None,
    device: Annotated[int, typer.Option(min=0, help="Number of the GPU to build on (tensorrt).")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for a pack with the engine; by default only the cache has it.")
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="fp8 through modelopt, for Ada and later; else as the ONNX file.")
    ] = None,
    calibrate: Annotated[
        Path | None, typer.Option(help="For fp8: a file of real texts, one a line, or a folder of pictures.")
    ] = None,
    overwrite: Overwrite = False,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Build it although the cache has it.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the engine's description as JSON.")] = False,
) -> None:
    """Build the TensorRT engine of a pack's decomposed ONNX file, into the cache or as a pack of its own."""
    from safeguard.backends.engine_spec import SPEC_SUFFIX, EngineSpec
    from safeguard.exporters import tensorrt as builder
    from safeguard.exporters import tensorrt_pack as packs
    from safeguard.packs import resolve

    path = Path(model).expanduser()
    _refuse(path, out, dtype, calibrate)
    with _progress() as show:
        options: dict[str, Any] = {
            "flavour": flavour.value,
            "buckets": _buckets(lengths, batches),
            "architectures": architecture or (),
            "device": device,
            "rebuild": rebuild,
            "progress": show,
        }
        if out is not None:
            packs.export_tensorrt(resolve(model), out, fp8=calibrate, overwrite=overwrite, **options)
            spec, where = EngineSpec.read(out.expanduser() / (packs.ENGINE_NAME + SPEC_SUFFIX)), out
        else:
            is_file = path.suffix == ".onnx"
            entry = (
                builder.build_engine(path, **options)
                if is_file
                else packs.build_pack_engine(resolve(model), **options)
            )
            spec, where = entry.spec, entry.path
    _report(spec, where, json=json)


def _refuse(path: Path, out: Path | None, dtype: Dtype | None, calibrate: Path | None) -> None:
    """Options that do not go together."""
    if path.suffix == ".onnx" and out is not None:
        raise ValueError("--out writes a pack, so MODEL must be one; an .onnx file goes to the cache")
    if dtype is Dtype.fp8 and out is None:
        raise ValueError("--dtype fp8 makes another model of it, so it is written as a pack: give --out")
    if (dtype is Dtype.fp8) != (calibrate is not None):
        raise ValueError("--dtype fp8 and --calibrate go together: fp8 takes its ranges from real content")


def _report(spec: EngineSpec, where: Path, *, json: bool) -> None:
    if json:
        typer.echo(json_module.dumps({**spec.model_dump(mode="json"), "path": str(where)}))
        return
    lengths = ", ".join(map(str, spec.buckets.lengths)) or "none"
    typer.echo(f"{where}: {spec.flavour} {spec.version}, {spec.architecture}, {spec.precision}")
    typer.echo(
        f"  lengths {lengths}; batches {', '.join(map(str, spec.buckets.batches))}; {spec.size_bytes} bytes"
    )


def _buckets(lengths: str | None, batches: str | None) -> Buckets:
    from safeguard.backends.engine_spec import BATCHES, LENGTHS, Buckets

    return Buckets(
        lengths=LENGTHS if lengths is None else sizes(lengths),
        batches=BATCHES if batches is None else sizes(batches),
    )


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar for each phase of the build, on a terminal; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress, TaskID

    with Progress(console=Console(stderr=True), transient=True) as bars:
        shown: dict[str, TaskID] = {}

        def show(phase: str, done: int, steps: int) -> None:
            if phase not in shown:
                shown[phase] = bars.add_task(phase, total=steps)
            bars.update(shown[phase], completed=done, total=steps, visible=done < steps)

        yield show
