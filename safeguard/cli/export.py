"""`safeguard export`: models as packs that run faster, each compared with the model that it came from."""

from __future__ import annotations

import json as json_module
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safeguard.cli import export_genai, export_tensorrt, export_triton

if TYPE_CHECKING:
    from safeguard.manifest import Manifest

app = typer.Typer(no_args_is_help=True, help="Export models, compared with what they came from.")

Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the pack at OUT, at the end and at once.")
]


class Task(StrEnum):
    """What kind of model SOURCE is."""

    auto = "auto"
    text_classifier = "text-classifier"
    clip = "clip"
    causal_lm = "causal-lm"
    optimum = "optimum"


class Dtype(StrEnum):
    """Numbers inside the graph."""

    float32 = "float32"
    float16 = "float16"
    int8 = "int8"


class Flavour(StrEnum):
    """native for onnxruntime, decomposed for TensorRT."""

    native = "native"
    decomposed = "decomposed"


class Via(StrEnum):
    """Who writes the graph."""

    torch = "torch"
    optimum = "optimum"


app.command("tensorrt")(export_tensorrt.tensorrt)
app.command("genai")(export_genai.genai)
app.command("triton")(export_triton.triton)


@app.callback()
def _group() -> None:
    """Export models, compared with what they came from."""


@app.command("onnx")
def onnx(
    source: Annotated[str, typer.Argument(help="Folder of a model, or owner/name on the hub.")],
    out: Annotated[Path, typer.Argument(help="The pack's folder, which must not be there yet.")],
    task: Annotated[Task, typer.Option(help="By default what the model's config says.")] = Task.auto,
    heads: Annotated[
        list[Path] | None,
        typer.Option(help="File of heads (.npz, .safetensors) for a CLIP tower; may be repeated."),
    ] = None,
    head: Annotated[
        list[str] | None, typer.Option(help="Only the heads of these categories; may be repeated.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Numbers inside the graph.")] = Dtype.float32,
    opset: Annotated[int | None, typer.Option(help="ONNX opset; by default 23 (native) or 20.")] = None,
    flavour: Annotated[
        Flavour | None, typer.Option(help="native for onnxruntime (default), decomposed for TensorRT.")
    ] = None,
    labels: Annotated[str | None, typer.Option(help="Names of the logits in order: toxic,insult,...")] = None,
    texts: Annotated[
        Path | None, typer.Option(help="Texts, one a line, on which float16 and int8 are judged as well.")
    ] = None,
    max_flips: Annotated[
        float | None, typer.Option(min=0, max=1, help="Largest share of decisions that may differ.")
    ] = None,
    optimise: Annotated[bool, typer.Option("--optimise", help="Fuse layers for onnxruntime.")] = False,
    name: Annotated[str | None, typer.Option(help="The pack's name; by default that of SOURCE.")] = None,
    license: Annotated[str | None, typer.Option(help="The model's licence, for the pack's manifest.")] = None,
    via: Annotated[Via, typer.Option(help="Who writes the graph.")] = Via.torch,
    overwrite: Overwrite = False,
    json: Annotated[bool, typer.Option("--json", help="Print the record of the export as JSON.")] = False,
) -> None:
    """A text classifier, CLIP tower with heads, or causal LM as an ONNX pack."""
    from safeguard.exporters.writing import refuse_existing

    _refuse_nested(source, out)
    refuse_existing(out, overwrite=overwrite)
    chosen = _task_of(source) if task is Task.auto else task
    fields = {k: v for k, v in (("name", name), ("license", license)) if v}
    shape = _shape(flavour, opset)
    names = [part.strip() for part in labels.split(",")] if labels else None
    with terminable(), progress() as say:
        if via is Via.optimum or chosen is Task.optimum:
            made = _from_optimum(source, out, via, labels=names, overwrite=overwrite, fields=fields, say=say)
        elif chosen is Task.clip:
            hush()
            from safeguard.exporters import clip

            found = clip.read_named_heads(heads or [], head or ())
            made = clip.export_clip(
                clip.read_tower(source),
                found,
                out,
                dtype=dtype.value,
                max_flips=max_flips,
                overwrite=overwrite,
                fields=fields,
                say=say,
                **shape,
            )
        elif chosen is Task.causal_lm:
            made = _causal_lm(source, out, dtype, fields, overwrite=overwrite, say=say, **shape)
        else:
            hush()
            from safeguard.exporters import text_classifier as text

            made = text.export_text_classifier(
                text.read_text_model(source, labels=names),
                out,
                dtype=dtype.value,
                optimise=optimise,
                texts=_lines(texts),
                max_flips=max_flips,
                overwrite=overwrite,
                fields=fields,
                say=say,
                **shape,
            )
    report(made, out, json=json)


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A function to tell each long step: a spinner on a terminal, lines on stderr elsewhere."""
    if not sys.stderr.isatty():
        yield lambda step: typer.echo(step, err=True)
        return
    from rich.console import Console

    with Console(stderr=True).status("starting") as status:
        yield status.update


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that nothing half-written stays behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def hush() -> None:
    """No bars of transformers' own between the steps."""
    from safeguard.errors import MissingExtra

    try:
        from transformers.utils import logging
    except ImportError as exc:
        raise MissingExtra("transformers", "export") from exc
    logging.disable_progress_bar()


def _shape(flavour: Flavour | None, opset: int | None) -> dict[str, Any]:
    """Flavour and opset; an old opset without a flavour means a decomposed graph."""
    if flavour is None:
        flavour = Flavour.decomposed if opset is not None and opset < 23 else Flavour.native
    return {"flavour": flavour.value, "opset": opset}


def _task_of(source: str) -> Task:
    """What the folder's config.json says it is; a text classifier for names on the hub."""
    folder = Path(source).expanduser()
    if not (folder / "config.json").is_file():
        return Task.text_classifier  # whose reader says what is wrong
    from safeguard.exporters.optimum import is_optimum

    if is_optimum(folder):
        return Task.optimum
    try:
        config = json_module.loads((folder / "config.json").read_text(encoding="utf-8"))
        named = " ".join(config.get("architectures") or [])
        kind = config.get("model_type")
    except (OSError, ValueError, AttributeError, TypeError) as exc:
        raise ValueError(f"{folder / 'config.json'} cannot be read: {exc}") from exc
    if kind in ("clip", "clip_vision_model"):
        return Task.clip
    if named.endswith(("ForCausalLM", "LMHeadModel")):
        return Task.causal_lm
    return Task.text_classifier


def _causal_lm(source: str, out: Path, dtype: Dtype, fields: dict[str, str], **options: Any) -> Manifest:
    hush()
    from safeguard.exporters.causal_lm import export_causal_lm, read_causal_lm
    from safeguard.exporters.text_classifier import pack_name

    numbers: Any = "int8-weights" if dtype is Dtype.int8 else dtype.value
    model, tokenizer, template = read_causal_lm(source)
    return export_causal_lm(
        model,
        tokenizer,
        out,
        dtype=numbers,
        template=template,
        fields={"name": pack_name(source), **fields},
        **options,
    )


def _from_optimum(source: str, out: Path, via: Via, **options: Any) -> Manifest:
    from safeguard.exporters import optimum

    if via is Via.optimum and not optimum.is_optimum(Path(source).expanduser()):
        return optimum.export_via_optimum(source, out, **options)
    return optimum.convert(Path(source).expanduser(), out, **options)


def _refuse_nested(source: str, out: Path) -> None:
    folder = Path(source).expanduser()
    if folder.is_dir() and folder.resolve().is_relative_to(out.expanduser().resolve()):
        raise ValueError(f"OUT must not be SOURCE or hold it, got {out}")


def _lines(path: Path | None) -> list[str] | None:
    if path is None:
        return None
    found = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not found:
        raise ValueError(f"{path} holds no text")
    return found


def report(made: Manifest, out: Path, *, json: bool) -> None:
    """Print where a pack lies and how far it is from its model."""
    record = made.export
    if json:
        typer.echo(record.model_dump_json() if record else "null")
        return
    typer.echo(f"{out}: {made.name}, {made.kind}, {made.precision}")
    for one in record.parity if record else ():
        flips = f", {one.flips} of {one.decisions} decisions differ" if one.decisions else ""
        typer.echo(f"  {one.tensor}: off by at most {one.max_abs:.2g} (largest {one.scale:.3g}){flips}")
