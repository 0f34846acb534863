"""Trains the denoiser of the example on cached latents and writes the whole as a `StableDiffusionPipeline`.

    python -m examples.emoji_diffusion.train --npm NPM_FOLDER --out RUN_FOLDER [--steps 5000]
    accelerate launch -m examples.emoji_diffusion.train ...                   # several GPUs

RUN_FOLDER holds what `train_vae` and `train_text_encoder` wrote. Every 500 steps it gets a checkpoint, from
which the same command resumes, and `RUN_FOLDER/pipeline`, the pipeline with the averaged weights in float16.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch.nn import functional as nn_functional
from transformers import BertModel, BertTokenizer

from examples.emoji_diffusion import data, training
from examples.emoji_diffusion.train_vae import as_tensor

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DiffusionConfig:
    """What decides the result. attends: whether each level of the UNet reads the prompt, finest first."""

    channels: tuple[int, ...] = (96, 128, 128)
    attends: tuple[bool, ...] = (False, True, True)
    head_size: int = 32
    steps: int = 5000
    batch: int = 64
    learning_rate: float = 5e-4
    warmup: int = 200
    compositions: int = 4000
    single_share: float = 0.6  # of a batch: one emoji on white
    loved_weight: int = 4  # how much oftener those that words.toml names are drawn
    no_prompt: float = 0.1  # classifier-free guidance, Ho & Salimans 2022
    snr_cap: float = 5.0  # Min-SNR, Hang et al. 2023
    ema: float = 0.999
    seed: int = 5
    precision: str = "bf16"
    save_every: int = 500


def build_unet(config: DiffusionConfig, sample_size: int, text_size: int) -> UNet2DConditionModel:
    """The untrained denoiser of latents of four channels."""
    down = tuple("CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in config.attends)
    up = tuple("CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(config.attends))
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=4,
        out_channels=4,
        down_block_types=down,
        up_block_types=up,
        block_out_channels=config.channels,
        layers_per_block=1,
        cross_attention_dim=text_size,
        attention_head_dim=tuple(
            c // config.head_size for c in config.channels
        ),  # the number of heads, in fact
        norm_num_groups=min(32, config.channels[0]),
    )


def build_scheduler() -> DDIMScheduler:
    """Cosine noise up to almost no signal, so that noise does not tell the brightness; v-prediction."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


@dataclass(frozen=True, slots=True)
class World:
    """The scenes to train on, the singles first, and their latents in the same order: (scene, 4, 16, 16)."""

    singles: Sequence[data.Scene]
    weights: Sequence[int]
    compositions: Sequence[data.Scene]
    latents: torch.Tensor


def build_world(config: DiffusionConfig, vae: AutoencoderKL, npm: Path, out: Path) -> World:
    """Scenes and their scaled latents, which are kept in `out` for the next run."""
    emoji = data.read_emoji(npm)
    singles = [data.single(e) for e in emoji.values()]
    weights = [config.loved_weight if e.loved else 1 for e in emoji.values()]
    compositions, _ = data.split(data.compositions(emoji, config.compositions, config.seed))
    scenes = [*singles, *compositions]
    of = hashlib.sha256(repr((scenes, float(vae.config.scaling_factor))).encode()).hexdigest()[:16]
    path = out / f"latents_{of}.safetensors"
    if not path.is_file():
        parts = []
        for start in range(0, len(scenes), 32):
            pixels = as_tensor([data.draw(scene, emoji) for scene in scenes[start : start + 32]]).to(
                vae.device
            )
            with torch.no_grad(), torch.autocast(pixels.device.type, torch.bfloat16):
                mean = vae.encode(pixels).latent_dist.mean
            parts.append((mean.float() * vae.config.scaling_factor).half().cpu())
        save_file({"latents": torch.cat(parts).contiguous()}, path)
    return World(singles, weights, compositions, load_file(path)["latents"].float())


def draw_batch(world: World, config: DiffusionConfig, rng: random.Random) -> tuple[torch.Tensor, list[str]]:
    """Latents (batch, 4, 16, 16) and what each one is called, "" for a tenth of them."""
    rows, captions = [], []
    for _ in range(config.batch):
        if rng.random() < config.single_share or not world.compositions:
            (row,) = rng.choices(range(len(world.singles)), world.weights)
            scene = world.singles[row]
        else:
            row = rng.randrange(len(world.compositions))
            scene, row = world.compositions[row], row + len(world.singles)
        rows.append(row)
        caption = data.frame(rng.choice(scene.captions), rng)
        captions.append("" if rng.random() < config.no_prompt else caption)
    return world.latents[rows], captions


@torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not followed
def encode_text(tokenizer: BertTokenizer, encoder: BertModel, texts: Sequence[str]) -> torch.Tensor:
    """(text, token, size), as `StableDiffusionPipeline` does it: padded to full length, padding masked."""
    batch = tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").to(
        encoder.device
    )
    states: torch.Tensor = encoder(batch["input_ids"], attention_mask=batch["attention_mask"])[0]
    return states


def denoising_loss(
    predicted: torch.Tensor, velocity: torch.Tensor, alpha: torch.Tensor, snr_cap: float
) -> torch.Tensor:
    """Mean squared error of v, weighted by min(SNR, cap) / (SNR + 1).

    predicted, velocity: (batch, 4, height, width). alpha: (batch,), the cumulative product of alphas.
    Source: Hang et al. 2023, Min-SNR-gamma for v-prediction.
    """
    snr = alpha / (1 - alpha)
    per_picture = nn_functional.mse_loss(predicted, velocity, reduction="none").mean(dim=(1, 2, 3))
    return (per_picture * snr.clamp(max=snr_cap) / (snr + 1)).mean()


def train(
    config: DiffusionConfig, npm: Path, out: Path, *, stop_at: int | None = None
) -> StableDiffusionPipeline:
    """Trains or resumes; the pipeline as it then is. Writes `out`/pipeline and `out`/checkpoint.pt.

    stop_at: the step to break off at, to be resumed later; the schedule stays that of `config.steps`.
    """
    accelerator = Accelerator(mixed_precision=config.precision)
    device, rank = accelerator.device, accelerator.process_index
    vae = AutoencoderKL.from_pretrained(out / "vae").eval().to(device)
    encoder = BertModel.from_pretrained(out / "text_encoder", dtype=torch.float32).eval().to(device)
    tokenizer = BertTokenizer.from_pretrained(out / "tokenizer")
    world = build_world(config, vae, npm, out)
    scheduler = build_scheduler()
    alphas = scheduler.alphas_cumprod
    torch.manual_seed(config.seed)
    unet = build_unet(config, world.latents.shape[-1], encoder.config.hidden_size)
    unet = unet.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    state = training.load_checkpoint(out / "checkpoint.pt")
    first, history, spent_s = 0, [], 0.0
    if state is not None:
        unet.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, history, spent_s = state["step"], state["history"], state["spent_s"]
    averaged = [p.detach().clone().to(device) for p in unet.parameters()]
    if state is not None:
        averaged = [p.to(device) for p in state["averaged"]]
    unet, optimizer = accelerator.prepare(unet, optimizer)
    started, losses = time.monotonic() - spent_s, []
    last = min(config.steps, config.steps if stop_at is None else stop_at)
    for step in range(first, last):
        rng, generator = training.step_rng(config.seed, step, rank)
        latents, captions = draw_batch(world, config, rng)
        noise = torch.randn(latents.shape, generator=generator)
        times = torch.randint(0, len(alphas), (config.batch,), generator=generator)
        noisy = scheduler.add_noise(latents, noise, times).to(device)
        velocity = scheduler.get_velocity(latents, noise, times).to(device)
        with accelerator.autocast():
            text = encode_text(tokenizer, encoder, captions)
            predicted = unet(noisy, times.to(device), text).sample
        loss = denoising_loss(predicted.float(), velocity, alphas[times].to(device), config.snr_cap)
        for group in optimizer.param_groups:
            factor = training.warmup_cosine(step, config.steps, warmup=config.warmup)
            group["lr"] = config.learning_rate * factor
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        keep = min(config.ema, (step + 1) / (step + 10))
        torch._foreach_lerp_(averaged, [p.detach() for p in unet.parameters()], 1 - keep)
        losses.append(loss.detach())
        if (step + 1) % 25 == 0 or step + 1 == last:
            history.append([step + 1, round(float(torch.stack(losses).mean()), 5)])
            losses.clear()
            log.info("step %d loss %.4f, %.0f s", *history[-1], time.monotonic() - started)
        if ((step + 1) % config.save_every == 0 or step + 1 == last) and accelerator.is_main_process:
            model = accelerator.unwrap_model(unet)
            progress = {"step": step + 1, "history": history, "spent_s": time.monotonic() - started}
            weights = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "averaged": averaged}
            training.save_checkpoint(out / "checkpoint.pt", weights | progress)
            save_pipeline(assemble(out, model, averaged), config, progress, npm, out)
    return assemble(out, accelerator.unwrap_model(unet), averaged)


def assemble(
    out: Path, unet: UNet2DConditionModel, averaged: Sequence[torch.Tensor]
) -> StableDiffusionPipeline:
    """A pipeline of fresh copies: the averaged weights on the CPU in float32, without a safety checker."""
    copy = UNet2DConditionModel.from_config(unet.config)
    for parameter, value in zip(copy.parameters(), averaged, strict=True):
        parameter.data.copy_(value)
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(out / "vae"),
        text_encoder=BertModel.from_pretrained(out / "text_encoder", dtype=torch.float32),
        tokenizer=BertTokenizer.from_pretrained(out / "tokenizer"),
        unet=copy.eval(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_pipeline(
    pipe: StableDiffusionPipeline, config: DiffusionConfig, progress: dict[str, Any], npm: Path, out: Path
) -> None:
    """`out`/pipeline in float16, and `metrics.json` in it."""
    folder = out / "pipeline"
    pipe.to(dtype=torch.float16).save_pretrained(folder)
    about = folder / "text_encoder" / "config.json"
    # transformers would load the encoder in the type it was saved in, diffusers loads the rest in float32
    training.write_json(about, json.loads(about.read_text(encoding="utf-8")) | {"dtype": "float32"})
    weights = sorted(folder.rglob("*.safetensors"))
    metrics = {
        "config": asdict(config),
        "steps_done": progress["step"],
        "seconds": round(progress["spent_s"]),
        "loss": progress["history"],
        "parameters": {name: sum(p.numel() for p in getattr(pipe, name).parameters()) for name in _MODELS},
        "weights": {path.relative_to(folder).as_posix(): training.digest(path) for path in weights},
        "data": {name: training.digest(npm / name) for name in data.SHA256},
    }
    training.write_json(folder / "metrics.json", metrics)


_MODELS = ("text_encoder", "unet", "vae")


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--npm", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=DiffusionConfig().steps)
    parser.add_argument("--stop-at", type=int)
    chosen = parser.parse_args()
    train(DiffusionConfig(steps=chosen.steps), chosen.npm, chosen.out, stop_at=chosen.stop_at)


if __name__ == "__main__":
    main()
