"""Opens the model of a pack from the bytes that were proven, so that nobody can exchange it in between."""

from __future__ import annotations

from safeguard.backends import Backend, open_backend
from safeguard.packs import Pack


def open_model(pack: Pack, device: str, threads: int | None) -> Backend:
    """The backend of a pack's model.

    The model file is read once, proven and opened from memory. Weights that lie beside it are read by the
    runtime itself, so those are proven again when it has them. Raises PackError and BackendError.
    """
    model = pack.manifest.model
    backend = open_backend(
        pack.model,
        inputs=model.inputs,
        outputs=model.outputs,
        device=device,
        threads=threads,
        external=pack.manifest.files,
        content=pack.read(model.file),
    )
    if getattr(backend, "external", ()):
        pack.verify()
    return backend
