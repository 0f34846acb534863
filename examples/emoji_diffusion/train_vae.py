"""Trains the autoencoder of the example: 64 x 64 pictures to 16 x 16 latents of four channels, and back.

    python -m examples.emoji_diffusion.train_vae --npm NPM_FOLDER --out RUN_FOLDER

NPM_FOLDER holds the two archives of `npm pack emoji-datasource-google@16.0.0 emojilib@4.0.3`. Run it again
to resume.
"""

from __future__ import annotations

import argparse
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL

from examples.emoji_diffusion import data, training

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class VaeConfig:
    """What decides the result. kl_weight: per latent number, against L1 per pixel channel.

    square_weight: of the squared error; with L1 alone the fourth channel stays idle and red turns to orange.
    """

    channels: tuple[int, ...] = (32, 64, 128)
    steps: int = 1500
    batch: int = 16
    learning_rate: float = 2e-3
    kl_weight: float = 1e-4
    square_weight: float = 1.0
    seed: int = 5
    precision: str = "bf16"
    save_every: int = 100


def build_vae(config: VaeConfig) -> AutoencoderKL:
    """The untrained autoencoder; halves the side once per channel count after the first."""
    depth = len(config.channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        block_out_channels=config.channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=data.SIZE_PX,
    )


def as_tensor(pictures: list[data.Pixels]) -> torch.Tensor:
    """(picture, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_vae(config: VaeConfig, npm: Path, out: Path) -> AutoencoderKL:
    """Trains or resumes, and writes `out`/vae with the scaling factor measured and `out`/vae_metrics.json."""
    accelerator = Accelerator(mixed_precision=config.precision)
    emoji = data.read_emoji(npm)
    singles = [data.single(e) for e in emoji.values()]
    scenes, held_out = data.split(data.compositions(emoji, 6000, config.seed))
    torch.manual_seed(config.seed)
    vae = build_vae(config).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.learning_rate, weight_decay=1e-4, fused=True)
    out.mkdir(parents=True, exist_ok=True)
    state, first = training.load_checkpoint(out / "vae_checkpoint.pt"), 0
    if state is not None:
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    vae, optimizer = accelerator.prepare(vae, optimizer)
    started = time.monotonic()
    for step in range(first, config.steps):
        rng, generator = training.step_rng(config.seed, step, accelerator.process_index)
        picked = [rng.choice(singles if rng.random() < 0.6 else scenes) for _ in range(config.batch)]
        pixels = as_tensor([data.draw(scene, emoji) for scene in picked]).to(accelerator.device)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * training.warmup_cosine(step, config.steps, warmup=50)
        with accelerator.autocast():
            model = accelerator.unwrap_model(vae)
            posterior = model.encode(pixels).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(accelerator.device)
            decoded = model.decode(posterior.mean + posterior.std * noise).sample
        error = decoded.float() - pixels
        loss_pixels = error.abs().mean() + config.square_weight * error.square().mean()
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        loss_kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        accelerator.backward(loss_pixels + config.kl_weight * loss_kl)
        accelerator.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 20 == 0 and accelerator.is_main_process:
            log.info(
                "step %d l1 %.4f kl %.1f, %.0f s", step + 1, loss_pixels, loss_kl, time.monotonic() - started
            )
        if (step + 1) % config.save_every == 0 and accelerator.is_main_process:
            weights = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            training.save_checkpoint(out / "vae_checkpoint.pt", weights)
    vae = accelerator.unwrap_model(vae).eval()
    if accelerator.is_main_process:
        _save(vae, config, as_tensor([data.draw(s, emoji) for s in (*singles, *held_out)]), npm, out)
    return vae


@torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not followed
def _save(vae: AutoencoderKL, config: VaeConfig, pixels: torch.Tensor, npm: Path, out: Path) -> None:
    """Measures 1 / standard deviation of the latents, for `scaling_factor`, and the error; writes both."""
    errors, latents = [], []
    for batch in pixels.split(32):
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            mean = vae.encode(batch.to(vae.device)).latent_dist.mean
            decoded = vae.decode(mean).sample.float().cpu()
        latents.append(mean.float().cpu())
        errors.append((decoded.clamp(-1, 1) - batch).abs().mean(dim=(1, 2, 3)))
    every = torch.cat(latents)
    vae.register_to_config(scaling_factor=1 / float(every.std()), force_upcast=False)
    vae.save_pretrained(out / "vae")
    metrics = {
        "l1_of_255": float(torch.cat(errors).mean()) * 127.5,
        "scaling_factor": 1 / float(every.std()),
        "latent_mean": every.mean(dim=(0, 2, 3)).tolist(),
        "latent_std": every.std(dim=(0, 2, 3)).tolist(),
        "config": asdict(config),
        "data": {name: training.digest(npm / name) for name in data.SHA256},
    }
    training.write_json(out / "vae_metrics.json", metrics)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--npm", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=VaeConfig().steps)
    chosen = parser.parse_args()
    train_vae(VaeConfig(steps=chosen.steps), chosen.npm, chosen.out)


if __name__ == "__main__":
    main()
