"""A frozen picture encoder, from a CLIP folder or a model pack: its embeddings, and a pack with a head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from safeguard.backends import Backend
from safeguard.checks.clip_heads import HEADS_NAME, PromptPair, write_heads
from safeguard.checks.image_classifier import image_spec, rows_of_a_run
from safeguard.checks.opening import open_model
from safeguard.errors import MissingExtra, PackError
from safeguard.images import open_image, prepare
from safeguard.manifest import MANIFEST_NAME, ImagePreprocess, Manifest
from safeguard.packs import Pack, resolve, seal
from safeguard.train.q16_data import LabelledPicture, digest_of_arrays

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from safeguard.exporters.clip import Tower

HUB = "hub:"
"""Before the name of a CLIP model on the hub."""
_BESIDE = frozenset({HEADS_NAME, MANIFEST_NAME, "README.md"})


@dataclass(frozen=True)
class PictureEncoder:
    """A model that is not trained: `input` pixels in, `output` embeddings (picture, dimension) out.

    texts: unit embeddings (text, dimension) of the same space, for encoders that have them. write: makes a
    clip_heads pack of the encoder and a head in a new folder.
    """

    name: str
    digest: str
    image: ImagePreprocess
    backend: Backend = field(repr=False)
    write: Callable[[PromptPair, Path, Mapping[str, Any]], Manifest] = field(repr=False)
    texts: Callable[[Sequence[str]], NDArray[np.float32]] | None = field(default=None, repr=False)
    input: str = "pixel_values"
    output: str = "image_embeds"
    batch_size: int = 8


@dataclass(frozen=True, eq=False)
class Embedded:
    """Unit embeddings (view, dimension) of pictures, and for each view the number of its picture."""

    rows: NDArray[np.float32] = field(repr=False)
    owners: NDArray[np.int64] = field(repr=False)

    def index(self) -> NDArray[np.int64]:
        """(picture, view) places in `rows`; shorter rows repeat their first, which no maximum notices."""
        count = np.bincount(self.owners)
        starts = np.concatenate([[0], np.cumsum(count)[:-1]]).astype(np.int64)
        steps = np.arange(int(count.max(initial=0)))
        return np.where(steps < count[:, None], starts[:, None] + steps, starts[:, None])


def open_encoder(
    source: str | Path, *, device: str = "cpu", output: str | None = None, threads: int | None = None
) -> PictureEncoder:
    """The encoder in a folder of a CLIP model, behind `hub:owner/name`, or in a pack.

    Packs of kind clip_heads and module give their first output; of an image_classifier that is no embedding,
    so output must name one. Raises PackError and ExportError for what is no picture encoder, ValueError
    where output is missing.
    """
    text = str(source)
    folder = Path(source).expanduser()
    if text.startswith(HUB) or ((folder / "config.json").is_file() and not (folder / MANIFEST_NAME).exists()):
        from safeguard.exporters.clip import read_tower  # needs the exporter's packages; a pack does not

        place = text.removeprefix(HUB) if text.startswith(HUB) else folder
        return from_tower(read_tower(place), device=device, source=place)
    return from_pack(
        resolve(str(folder.resolve()) if folder.is_dir() else text),
        device=device,
        output=output,
        threads=threads,
    )


def from_pack(
    pack: Pack, *, device: str = "cpu", output: str | None = None, threads: int | None = None
) -> PictureEncoder:
    """The encoder in a model pack; see `open_encoder`."""
    manifest = pack.manifest
    if manifest.kind not in ("clip_heads", "module", "image_classifier"):
        raise PackError(f"pack {manifest.name!r} is a {manifest.kind}, which gives no picture embeddings")
    if manifest.kind == "image_classifier" and output is None:
        raise ValueError(
            f"pack {manifest.name!r} is an image_classifier: name the output of its model "
            "that holds embeddings (--output)"
        )
    chosen = output or manifest.model.outputs[0]
    model = manifest.model.model_copy(update={"outputs": (chosen,)})
    narrowed = Pack(pack.folder, manifest.model_copy(update={"model": model}), pack.digest)

    def write(head: PromptPair, out: Path, fields: Mapping[str, Any]) -> Manifest:
        return _write_beside(narrowed, head, out, fields)

    return PictureEncoder(
        manifest.name,
        pack.digest,
        image_spec(pack),
        open_model(narrowed, device, threads),
        write,
        input=model.inputs[0],
        output=chosen,
        batch_size=rows_of_a_run(manifest, device),
    )


def from_tower(tower: Tower, *, device: str = "cpu", source: str | Path | None = None) -> PictureEncoder:
    """The encoder of a tower in memory; source: the CLIP folder or hub name that has its text half too."""
    from safeguard.backends.torch import ModuleBackend

    def write(head: PromptPair, out: Path, fields: Mapping[str, Any]) -> Manifest:
        from safeguard.exporters.clip import export_clip

        return export_clip(tower, [head], out, fields={"name": f"{tower.name}-q16", **fields})

    def texts(prompts: Sequence[str]) -> NDArray[np.float32]:
        return _clip_texts(str(source), prompts)

    state = sorted(tower.model.state_dict().items())
    return PictureEncoder(
        tower.name,
        digest_of_arrays((name, value.detach().cpu().float().numpy()) for name, value in state),
        tower.image,
        ModuleBackend(tower.model.eval(), inputs=["pixel_values"], outputs=["image_embeds"], device=device),
        write,
        None if source is None else texts,
        batch_size=8 if device == "cpu" else 32,
    )


def embed(
    encoder: PictureEncoder, pictures: Sequence[LabelledPicture], *, mirrored: bool = False
) -> Embedded:
    """Unit embeddings of every view of every picture, as the check sees them.

    mirrored: of the pictures turned left to right. Raises ValueError naming a picture that cannot be read, or
    whose embedding is not finite or has no direction.
    """
    rows: list[NDArray[np.float32]] = []
    owners: list[NDArray[np.int64]] = []
    for start in range(0, len(pictures), encoder.batch_size):
        part = pictures[start : start + encoder.batch_size]
        prepared = prepare([_open(picture, mirrored=mirrored) for picture in part], encoder.image)
        for at in range(0, len(prepared.array), encoder.batch_size):
            found = encoder.backend({encoder.input: prepared.array[at : at + encoder.batch_size]})
            rows.append(_two_axes(found[encoder.output], encoder))
        owners.append(prepared.owners + start)
    if not rows:
        return Embedded(np.zeros((0, 0), np.float32), np.zeros(0, np.int64))
    every, owner = np.concatenate(rows).astype(np.float32), np.concatenate(owners)
    lengths = np.linalg.norm(every, axis=1, keepdims=True)
    bad = np.flatnonzero(~np.isfinite(lengths[:, 0]) | (lengths[:, 0] == 0))
    if len(bad):
        name = pictures[int(owner[bad[0]])].name
        raise ValueError(f"{encoder.name} gives {name} an embedding that is not finite or has no direction")
    return Embedded(every / lengths, owner)


def _open(picture: LabelledPicture, *, mirrored: bool) -> Image.Image:
    try:
        image = open_image(picture.path)
    except ValueError as exc:
        raise ValueError(f"{picture.name}: {exc}") from exc
    return ImageOps.mirror(image) if mirrored else image


def _two_axes(found: NDArray[Any], encoder: PictureEncoder) -> NDArray[Any]:
    """(picture, dimension), of a model that leaves axes of one place behind as well."""
    flat = found.reshape(len(found), -1)
    if flat.shape[1] != max(found.shape[1:], default=0):
        raise ValueError(
            f"output {encoder.output!r} of {encoder.name} must be (picture, dimension), got {found.shape}"
        )
    return flat


def _clip_texts(source: str, prompts: Sequence[str]) -> NDArray[np.float32]:
    try:
        import torch
        import transformers
    except ImportError as exc:
        raise MissingExtra(exc.name or "transformers", "torch") from exc
    try:
        model = transformers.CLIPModel.from_pretrained(source, use_safetensors=True).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as exc:
        raise ValueError(f"{source} has no text half with a tokenizer, so init cannot be 'text'") from exc
    inputs = tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        pooled = model.text_model(**inputs).pooler_output
        found: NDArray[np.float32] = model.text_projection(pooled).float().numpy()  # (text, dimension)
    unit: NDArray[np.float32] = found / np.linalg.norm(found, axis=1, keepdims=True)
    return unit


def _write_beside(pack: Pack, head: PromptPair, out: Path, fields: Mapping[str, Any]) -> Manifest:
    """The model of a pack with another head, as a new pack."""
    from safeguard.exporters.writing import new_folder

    manifest = pack.manifest
    with new_folder(out) as folder:
        for name in manifest.files:
            if name not in _BESIDE:
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(pack.read(name))
        write_heads(folder / HEADS_NAME, [head])
        return seal(
            folder,
            {
                "name": f"{manifest.name}-q16",
                "version": "1",
                "kind": "clip_heads",
                "model": manifest.model.model_dump(),
                "labels": [head.category],
                "image": image_spec(pack).model_dump(),
                "license": manifest.license,
                "precision": manifest.precision,
                "data": [source.model_dump() for source in manifest.data],
                **fields,
            },
        )
