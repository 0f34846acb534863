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

if TYPE_CHECKING:
    from safeguard.backends.engine_cache import Entry
    from safeguard.backends.engine_spec import Buckets


class Flavour(StrEnum):
    """Which library builds and runs the engine."""

    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt_rtx"


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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the pack at OUT, at once.")] = False,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Build it although the cache has it.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the engine's description as JSON.")] = False,
) -> None:
    """Build the TensorRT engine of a pack's decomposed ONNX file, into the cache or as a pack of its own."""
    from safeguard.exporters import tensorrt as builder
    from safeguard.exporters import tensorrt_pack as packs
    from safeguard.packs import resolve

    path = Path(model).expanduser()
    with _progress() as show:
        options: dict[str, Any] = {
            "flavour": flavour.value,
            "buckets": _buckets(lengths, batches),
            "architectures": architecture or (),
            "device": device,
            "rebuild": rebuild,
            "progress": show,
        }
        if path.suffix == ".onnx":
            if out is not None:
                raise ValueError("--out writes a pack, so MODEL must be one; an .onnx file goes to the cache")
            entry = builder.build_engine(path, **options)
        else:
            pack = resolve(model)
            if out is not None:
                packs.export_tensorrt(pack, out, overwrite=overwrite, **options)
                options["rebuild"] = False  # done; the cache has it
            entry = packs.build_pack_engine(pack, **options)
    _report(entry, out, json=json)


def _report(entry: Entry, out: Path | None, *, json: bool) -> None:
    spec = entry.spec
    if json:
        typer.echo(json_module.dumps({**spec.model_dump(mode="json"), "path": str(out or entry.path)}))
        return
    sizes = ", ".join(map(str, spec.buckets.lengths)) or "none"
    typer.echo(f"{out or entry.path}: {spec.flavour} {spec.version}, {spec.architecture}, {spec.precision}")
    typer.echo(
        f"  lengths {sizes}; batches {', '.join(map(str, spec.buckets.batches))}; {spec.size_bytes} bytes"
    )


def _buckets(lengths: str | None, batches: str | None) -> Buckets:
    from safeguard.backends.engine_spec import BATCHES, LENGTHS, Buckets

    return Buckets(lengths=_sizes(lengths, LENGTHS), batches=_sizes(batches, BATCHES))


def _sizes(text: str | None, usual: tuple[int, ...]) -> tuple[int, ...]:
    if text is None:
        return usual
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"sizes must be whole numbers such as 16,32,64, got {text!r}")
    return tuple(sorted({int(part) for part in parts}))


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
