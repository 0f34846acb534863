"""Latents of a pipeline decoded to pictures, so that `output_type="latent"` is checked like any other."""

from __future__ import annotations

import inspect
from typing import Any

_DECODERS = frozenset({"AutoencoderKL", "AutoencoderTiny", "AutoencoderDC"})
"""VAEs whose pipelines all decode `latents / scaling_factor + shift_factor`; of others nothing is assumed."""


def decodes(pipe: Any) -> bool:
    """Whether the latents of this pipeline can be decoded at all, as far as its VAE tells."""
    return type(getattr(pipe, "vae", None)).__name__ in _DECODERS


class Decoder:
    """Decodes one latent as the pipeline itself would; gives None where that is not known for sure.

    size: width and height that were asked for, in pixels; needed for packed latents (Flux). running: the
    pipeline is in the middle of a call, so its models are left on the devices where they are.
    """

    def __init__(self, pipe: Any, size: tuple[int, int], *, running: bool = False) -> None:
        self._pipe, self._running = pipe, running
        self._width, self._height = size

    def __call__(self, latent: Any) -> Any:
        """A picture (3, height, width) in [0, 1], of (channel, height, width) or packed (patch, channel)."""
        vae = getattr(self._pipe, "vae", None)
        config = getattr(vae, "config", None)
        if config is None or type(vae).__name__ not in _DECODERS:
            return None
        latents = latent[None]
        if latents.ndim == 3:
            latents = self._unpacked(latents)
        if latents is None or latents.ndim != 4 or latents.shape[1] != config.latent_channels:
            return None
        return self._decoded(vae, latents)

    def _unpacked(self, latents: Any) -> Any:
        """(1, channel, height, width) from (1, patch, channel); None where it is not packed like Flux."""
        unpack = getattr(self._pipe, "_unpack_latents", None)
        factor = getattr(self._pipe, "vae_scale_factor", None)
        if unpack is None or not isinstance(factor, int) or type(self._pipe.vae).__name__ != "AutoencoderKL":
            return None
        # pipelines with `max_area` choose another size than the one asked for
        if "max_area" in inspect.signature(type(self._pipe).__call__).parameters:
            return None
        if list(inspect.signature(unpack).parameters) != ["latents", "height", "width", "vae_scale_factor"]:
            return None
        patches = (self._height // (2 * factor)) * (self._width // (2 * factor))
        if latents.shape[1] != patches or latents.shape[2] != 4 * self._pipe.vae.config.latent_channels:
            return None
        return unpack(latents, self._height, self._width, factor)

    def _decoded(self, vae: Any, latents: Any) -> Any:
        import torch

        config = vae.config
        # half precision overflows in the VAE of SDXL, whose pipeline decodes in single precision as well
        upcast = vae.dtype == torch.float16 and bool(getattr(config, "force_upcast", False))
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        try:
            if upcast:
                vae.to(dtype=torch.float32)
            z = latents.to(device=self._pipe._execution_device, dtype=vae.dtype)
            if mean is not None and std is not None:
                z = z * _row(std, z) / config.scaling_factor + _row(mean, z)
            else:
                z = z / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
            with torch.no_grad():
                picture = vae.decode(z, return_dict=False)[0]
        finally:
            if upcast:
                vae.to(dtype=torch.float16)
            if not self._running and getattr(self._pipe, "_all_hooks", None):
                self._pipe.maybe_free_model_hooks()
        return (picture[0] / 2 + 0.5).clamp(0, 1)


def _row(values: Any, like: Any) -> Any:
    import torch

    return torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, 1, 1)
