"""`safeguard export`: models as packs that run faster, each compared with the model that it came from."""

from __future__ import annotations

import json as json_module
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safeguard.cli import export_genai, export_tensorrt, export_triton
from safeguard.cli.exporting import (
    License,
    Overwrite,
    PackName,
    RecordJson,
    hush,
    pack_fields,
    progress,
    report,
    terminable,
)

if TYPE_CHECKING:
    from safeguard.manifest import Manifest

app = typer.Typer(no_args_is_help=True, help="Export models, compared with what they came from.")


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


@dataclass(frozen=True)
class _Asked:
    """The options of one export that not every task takes; None, empty or False where not given."""

    heads: Sequence[Path]
    head: Sequence[str]
    dtype: Dtype | None
    opset: int | None
    flavour: Flavour | None
    labels: str | None
    texts: Path | None
    max_flips: float | None
    optimise: bool
    via_optimum: bool

    def refuse_others(self, task: Task) -> None:
        """Raises ValueError for an option that this task would not look at."""
        known = _TAKES[task]
        given = [f.name for f in fields(self) if getattr(self, f.name) not in (None, (), False)]
        for name in given:
            if name not in known:
                flags = ", ".join(_flag(one) for one in known if one != "via_optimum")
                raise ValueError(f"{_flag(name)} says nothing to a model of task {task}; it takes {flags}")

    @property
    def numbers(self) -> str:
        return (self.dtype or Dtype.float32).value

    @property
    def shape(self) -> dict[str, Any]:
        """Flavour and opset; an old opset without a flavour means a decomposed graph."""
        is_old = self.opset is not None and self.opset < 23
        flavour = self.flavour or (Flavour.decomposed if is_old else Flavour.native)
        return {"flavour": flavour.value, "opset": self.opset}

    @property
    def names(self) -> list[str] | None:
        return [part.strip() for part in self.labels.split(",")] if self.labels else None


_SHAPE = ("dtype", "opset", "flavour")
_TAKES: Mapping[Task, Sequence[str]] = {
    Task.text_classifier: (*_SHAPE, "labels", "texts", "max_flips", "optimise"),
    Task.clip: (*_SHAPE, "heads", "head", "max_flips"),
    Task.causal_lm: _SHAPE,
    Task.optimum: ("labels", "via_optimum"),
}

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
    dtype: Annotated[Dtype | None, typer.Option(help="Numbers inside the graph; by default float32.")] = None,
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
    name: PackName = None,
    license: License = None,
    via: Annotated[Via, typer.Option(help="Who writes the graph.")] = Via.torch,
    overwrite: Overwrite = False,
    json: RecordJson = False,
) -> None:
    """A text classifier, CLIP tower with heads, or causal LM as an ONNX pack."""
    from safeguard.exporters.writing import refuse_existing

    _refuse_nested(source, out)
    refuse_existing(out, overwrite=overwrite)
    chosen = _chosen(source, task, via)
    picked = (tuple(heads or ()), tuple(head or ()))
    by_optimum = via is Via.optimum
    asked = _Asked(*picked, dtype, opset, flavour, labels, texts, max_flips, optimise, by_optimum)
    asked.refuse_others(chosen)
    with terminable(), progress() as say:
        common = {"overwrite": overwrite, "fields": pack_fields(name, license), "say": say}
        made = _EXPORTS[chosen](source, out, asked, common)
    report(made, out, json=json)


def _chosen(source: str, task: Task, via: Via) -> Task:
    if via is Via.torch:
        return _task_of(source) if task is Task.auto else task
    if task in (Task.clip, Task.causal_lm):
        raise ValueError(f"--via optimum is for text classifiers, not for task {task}")
    return Task.optimum


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


def _text_classifier(source: str, out: Path, asked: _Asked, common: Mapping[str, Any]) -> Manifest:
    hush()
    from safeguard.exporters.text_classifier import export_text_classifier, read_text_model

    numbers: Any = asked.numbers
    return export_text_classifier(
        read_text_model(source, labels=asked.names),
        out,
        dtype=numbers,
        optimise=asked.optimise,
        texts=_lines(asked.texts),
        max_flips=asked.max_flips,
        **asked.shape,
        **common,
    )


def _clip(source: str, out: Path, asked: _Asked, common: Mapping[str, Any]) -> Manifest:
    hush()
    from safeguard.exporters.clip import export_clip, read_named_heads, read_tower

    numbers: Any = asked.numbers
    found = read_named_heads(asked.heads, asked.head)
    tower = read_tower(source)
    return export_clip(tower, found, out, dtype=numbers, max_flips=asked.max_flips, **asked.shape, **common)


def _causal_lm(source: str, out: Path, asked: _Asked, common: Mapping[str, Any]) -> Manifest:
    hush()
    from safeguard.exporters.causal_lm import export_causal_lm, read_causal_lm
    from safeguard.exporters.text_classifier import pack_name

    numbers: Any = "int8-weights" if asked.dtype is Dtype.int8 else asked.numbers
    model, tokenizer, template = read_causal_lm(source)
    named = {**common, "fields": {"name": pack_name(source), **common["fields"]}}
    return export_causal_lm(model, tokenizer, out, dtype=numbers, template=template, **asked.shape, **named)


def _from_optimum(source: str, out: Path, asked: _Asked, common: Mapping[str, Any]) -> Manifest:
    from safeguard.exporters import optimum

    folder = Path(source).expanduser()
    if asked.via_optimum and not optimum.is_optimum(folder):
        return optimum.export_via_optimum(source, out, labels=asked.names, **common)
    return optimum.convert(folder, out, labels=asked.names, **common)


_EXPORTS: Mapping[Task, Callable[[str, Path, _Asked, Mapping[str, Any]], Manifest]] = {
    Task.text_classifier: _text_classifier,
    Task.clip: _clip,
    Task.causal_lm: _causal_lm,
    Task.optimum: _from_optimum,
}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


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
