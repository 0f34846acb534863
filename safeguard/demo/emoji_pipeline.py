"""A diffusers pipeline for the demo: a real scheduler around the closed-form emoji denoiser.

A stand-in. It is not a trained text-to-image model: no weights of one can be had without a model hub.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from safeguard.demo.captions import CaptionIndex
from safeguard.demo.emoji_denoiser import Cell, EmojiDenoiser, lay_out
from safeguard.errors import MissingExtra

try:
    import torch
    from diffusers import DDIMScheduler, DiffusionPipeline, ImagePipelineOutput
    from diffusers.utils.torch_utils import randn_tensor
except ImportError as exc:
    raise MissingExtra(exc.name or "diffusers", extra="diffusers") from exc

TITLE = "closed-form emoji denoiser, not a trained text-to-image model"
_OUTPUT_TYPES = ("pil", "np", "pt")
_SMALLEST, _LARGEST = 32, 1024  # pixels of a side


class EmojiPipeline(DiffusionPipeline):  # type: ignore[misc]  # diffusers is untyped
    """Pictures of emoji from prompts, by diffusion in pixel space with the closed-form denoiser of the set.

    The scheduler must know `alphas_cumprod` and take x0 as the model's output (prediction_type "sample").
    """

    model_cpu_offload_seq = "denoiser"

    def __init__(self, denoiser: EmojiDenoiser, scheduler: DDIMScheduler) -> None:
        super().__init__()
        if scheduler.config.prediction_type != "sample":
            raise ValueError(
                "the scheduler must have prediction_type 'sample', because the denoiser gives x0, "
                f"got {scheduler.config.prediction_type!r}"
            )
        self.register_modules(denoiser=denoiser, scheduler=scheduler)
        self._index = CaptionIndex(denoiser.config.captions, denoiser.config.keywords)

    @classmethod
    def embedded(cls) -> EmojiPipeline:
        """The pipeline over the emoji that ship with the demo."""
        scheduler = DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,  # this and the next line: the schedule of Stable Diffusion 1
            beta_end=0.012,
            prediction_type="sample",
            rescale_betas_zero_snr=True,  # else the first step already knows how bright the picture is
            timestep_spacing="trailing",
            clip_sample=False,
        )
        pipe = cls(EmojiDenoiser.embedded(), scheduler)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not followed
    def __call__(
        self,
        prompt: str | list[str] = "",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict[str, Any]], dict[str, Any] | None] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Pictures of what the prompts name, up to four things each.

        guidance_scale: exponent of p(emoji | prompt). latents: the noise to start from,
        (picture, 3, height, width).
        callback_on_step_end: called with pipeline, step, timestep and {"latents": ...}; may give new ones.
        Returns `.images`: PIL, arrays (picture, height, width, 3) or tensors (picture, 3, height, width).
        Raises ValueError for sizes, counts and output types that it has not.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negatives = _negatives(negative_prompt, len(prompts))
        height = height or self.denoiser.config.sample_size
        width = width or self.denoiser.config.sample_size
        _refuse_wrong(height, width, num_inference_steps, num_images_per_prompt, output_type)
        scenes = [
            lay_out(self._index.concepts(text, negative, guidance=guidance_scale), width, height)
            for text, negative in zip(prompts, negatives, strict=True)
            for _ in range(num_images_per_prompt)
        ]
        shape = (len(scenes), 3, height, width)
        sample = _start(latents, shape, generator, self._execution_device) * self.scheduler.init_noise_sigma
        sample = self._denoise(sample, scenes, num_inference_steps, callback_on_step_end)
        images = _finish(sample, output_type, self.numpy_to_pil)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _denoise(
        self,
        sample: torch.Tensor,
        scenes: Sequence[Sequence[Cell]],
        steps: int,
        callback: Callable[..., Any] | None,
    ) -> torch.Tensor:
        """The sampling loop, as in every pipeline."""
        self.scheduler.set_timesteps(steps, device=sample.device)
        sides = {cell.side for cells in scenes for cell in cells}
        tiles = {side: self.denoiser.tiles(side) for side in sides}
        with self.progress_bar(total=steps) as bar:
            for i, t in enumerate(self.scheduler.timesteps):
                noisy = self.scheduler.scale_model_input(sample, t)
                clean = self.denoiser(noisy, float(self.scheduler.alphas_cumprod[int(t)]), scenes, tiles)
                sample = self.scheduler.step(clean, t, sample).prev_sample
                if callback is not None:
                    sample = (callback(self, i, t, {"latents": sample}) or {}).get("latents", sample)
                bar.update()
        return sample


def _negatives(given: str | list[str] | None, count: int) -> list[str]:
    """One negative text per prompt."""
    if given is None or isinstance(given, str):
        return [given or ""] * count
    if len(given) != count:
        raise ValueError(f"give one negative prompt per prompt ({count}) or a single one, got {len(given)}")
    return list(given)


def _refuse_wrong(height: int, width: int, steps: int, per_prompt: int, output_type: str) -> None:
    if not (_SMALLEST <= height <= _LARGEST and _SMALLEST <= width <= _LARGEST):
        raise ValueError(f"sides must be {_SMALLEST} to {_LARGEST} pixels, got {width} x {height}")
    if steps < 1 or per_prompt < 1:
        raise ValueError(
            f"num_inference_steps and num_images_per_prompt must be 1 or more, got {steps} and {per_prompt}"
        )
    if output_type not in _OUTPUT_TYPES:
        raise ValueError(f"output_type must be one of {', '.join(_OUTPUT_TYPES)}, got {output_type!r}")


def _start(
    latents: torch.Tensor | None,
    shape: tuple[int, ...],
    generator: torch.Generator | list[torch.Generator] | None,
    device: torch.device,
) -> torch.Tensor:
    """The noise to start from, drawn or as given."""
    if latents is None:
        noise: torch.Tensor = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        return noise
    if tuple(latents.shape) != shape:
        raise ValueError(f"latents must be {shape}, got {tuple(latents.shape)}")
    return latents.to(device=device, dtype=torch.float32)


def _finish(sample: torch.Tensor, output_type: str, to_pil: Callable[[Any], Any]) -> Any:
    """Pictures of the kind asked for from pixels in [-1, 1]."""
    pixels = (sample / 2 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return pixels
    array = pixels.cpu().permute(0, 2, 3, 1).numpy()  # (picture, height, width, 3)
    return array if output_type == "np" else to_pil(array)
