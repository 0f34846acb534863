"""The manifest of a model pack, `safeguard.json`: what a model is, what it says and how its input is made."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

MANIFEST_NAME = "safeguard.json"

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Probability = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class ModelFile(_Part):
    """A model on disk: file name inside the pack, what goes in, what comes out; axis 0 is the batch."""

    file: str
    inputs: tuple[str, ...]
    outputs: Annotated[tuple[str, ...], Field(min_length=1)]


class Window(_Part):
    """Longer texts are cut into windows of `tokens`, special tokens counted, that share `overlap`."""

    tokens: Annotated[int, Field(ge=8, le=8192)]
    overlap: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _overlap_is_smaller(self) -> Self:
        if self.overlap > self.tokens // 2:
            raise ValueError(f"overlap must be at most half of tokens, got {self.overlap} of {self.tokens}")
        return self


class ImagePreprocess(_Part):
    """How an RGB picture becomes the model's input array.

    "crop" sets the shorter side to `resize`, "squash" both sides; then the centre size x size is cut out.
    Pixel values 0..255 are multiplied by `scale`, then (x - mean) / std per channel in `channels` order.
    """

    size: Annotated[int, Field(ge=16, le=2048)]
    resize: Annotated[int, Field(ge=16, le=2048)]
    mode: Literal["crop", "squash"] = "crop"
    resample: Literal["bicubic", "bilinear"] = "bicubic"
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    channels: Literal["RGB", "BGR"] = "RGB"
    scale: float = 1 / 255
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @model_validator(mode="after")
    def _crop_fits(self) -> Self:
        if self.resize < self.size:
            raise ValueError(f"resize must be at least size, got {self.resize} and {self.size}")
        if not all(self.std):
            raise ValueError(f"std must not hold zeros, got {self.std}")
        return self


class Source(_Part):
    """One source of the data a pack was trained on."""

    name: str
    license: str
    rows: int = Field(default=0, ge=0)
    url: str = ""
    sha256: Sha256 | None = None


class TensorParity(_Part):
    """How far an export is from its model in one output, over `rows` rows of seeded inputs."""

    tensor: str
    max_abs: Annotated[float, Field(ge=0)]
    """Largest absolute difference."""
    scale: Annotated[float, Field(ge=0)]
    """Largest absolute value that the model itself gave."""
    flips: Annotated[int, Field(ge=0)] = 0
    """Decisions that came out differently, of `decisions`."""
    decisions: Annotated[int, Field(ge=0)] = 0
    rows: Annotated[int, Field(ge=1)]
    shapes: tuple[tuple[int, ...], ...] = ()
    """Shapes of this tensor that were compared."""


class ExportRecord(_Part):
    """How the model file was made and how well it agrees with the model that it came from."""

    exporter: str
    versions: dict[str, str] = Field(default_factory=dict)
    source: str = ""
    """Class of the model that was exported."""
    opset: Annotated[int, Field(ge=1)] | None = None
    flavour: Literal["native", "decomposed"] | None = None
    dtype: str = "float32"
    parity: tuple[TensorParity, ...] = ()


class Manifest(_Part):
    """What `safeguard.json` holds. Every file of the pack but the manifest is listed with its digest."""

    format: Literal[1] = 1
    name: Name
    version: str
    kind: Literal["text_classifier", "image_classifier", "clip_heads", "refiner", "module", "adapter"]
    summary: str = ""
    model: ModelFile
    labels: tuple[str, ...] = ()
    """Names of the columns of the model's first output, in order."""
    heads: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Head name -> its labels; a head is trained and calibrated as one."""
    ignored_labels: tuple[str, ...] = ()
    """Columns that are no risk (a safe class, identity mentions): never given out as scores."""
    activation: Literal["sigmoid", "softmax", "none"] = "sigmoid"
    temperatures: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Label -> T; probability = activation(logit / T). Absent: 1."""
    biases: dict[str, float] = Field(default_factory=dict)
    """Label -> b added to the logit before the temperature: activation((logit + b) / T). Absent: 0."""
    operating_points: dict[str, dict[str, Probability]] = Field(default_factory=dict)
    """Point (lenient, standard, strict) -> label -> calibrated threshold."""
    window: Window | None = None
    image: ImagePreprocess | None = None
    precision: str = "float32"
    separate_rows: bool = False
    """A row's outputs depend on the row and its own padding only, but for rounding, whatever shares its run:
    so rows may share runs although activations are quantised in the run. Says nothing for models that are
    not."""
    export: ExportRecord | None = None
    """Absent for packs that no exporter of ours made."""
    files: dict[str, Sha256]
    license: str
    data: tuple[Source, ...] = ()
    notes: str = ""

    @field_validator("files")
    @classmethod
    def _files_stay_inside(cls, files: dict[str, str]) -> dict[str, str]:
        for name in files:
            path = PurePosixPath(name)
            if (
                path.is_absolute()
                or ".." in path.parts
                or "\\" in name
                or not path.parts
                or not name.isprintable()
            ):
                raise ValueError(f"file {name!r} must be a relative path inside the pack")
        return files

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        if self.model.file not in self.files:
            raise ValueError(f"model file {self.model.file!r} is not listed in files")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels must be unique")
        known = set(self.labels)
        for what, names in (
            ("heads", [label for labels in self.heads.values() for label in labels]),
            ("ignored_labels", list(self.ignored_labels)),
            ("temperatures", list(self.temperatures)),
            ("biases", list(self.biases)),
            ("operating_points", [label for point in self.operating_points.values() for label in point]),
        ):
            unknown = sorted(set(names) - known)
            if unknown:
                raise ValueError(
                    f"{what} names {', '.join(unknown)}, not among the labels {', '.join(self.labels)}"
                )
        if self.kind == "text_classifier" and self.window is None:
            raise ValueError("a text_classifier needs a window")
        if self.kind in ("image_classifier", "clip_heads") and self.image is None:
            raise ValueError(f"a {self.kind} needs image (its preprocessing)")
        return self
