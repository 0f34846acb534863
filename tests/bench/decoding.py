"""What guards inside decoding cost per token, next to the bare model; and safety guidance per picture.

    python -m tests.bench.decoding [--repeats 21] [--new-tokens 32] [--smollm2] [--quick]

Runs that are compared are interleaved, and what is shown are medians of ratios to the bare run of the same
round. SmolLM2 writes half as many tokens, and does not run without caches: that alone would take minutes. An
anti-expert and an expert are as large as the guided model here; the value model has six layers of it (two
where the model has fewer) and a head of 256. Nothing asserts: timings are shown, not tested.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from safeguard.bench.machine import describe_machine
from safeguard.decoding import ContrastiveProcessor, RectificationProcessor, SafetyGuidance, ValueModel
from safeguard.train.value import small_trunk
from tests.adapters import tiny_pipelines
from tests.decoding.tables import tiny_llama

Runs = dict[str, Callable[[], object]]
_SMALL = 10_000_000  # parameters


def interleaved(runs: Runs, repeats: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of each run, and the median of its ratio to the first of the same round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = random.Random(0)
    for _ in range(repeats + 1):
        for name in order.sample(list(runs), len(runs)):
            started = time.perf_counter()
            runs[name]()
            times[name].append((time.perf_counter() - started) * 1e3)
    bare = next(iter(times.values()))
    return {
        name: {
            "ms": round(statistics.median(found[1:]), 3),  # the first is warm-up
            "ratio": round(statistics.median(f / b for f, b in zip(found[1:], bare[1:], strict=True)), 3),
        }
        for name, found in times.items()
    }


def language(model: Any, batch: int, prompt: int, new: int, repeats: int) -> dict[str, Any]:
    """Cost of each processor for greedy decoding of `new` tokens; without caches for small models alone."""
    vocabulary = int(model.config.vocab_size)
    layers = min(6, int(model.config.num_hidden_layers))
    value = ValueModel(small_trunk(model, layers), vocabulary, width=256).to(model.dtype).eval()
    ids = torch.randint(3, vocabulary, (batch, prompt), generator=torch.Generator().manual_seed(0))
    makers: dict[str, Callable[[], list[Any]]] = {
        "bare": list,
        "contrastive": lambda: [ContrastiveProcessor(model)],
        "dexperts, both": lambda: [ContrastiveProcessor(model, model, plausibility=None, top_p=0.9)],
        "rectify": lambda: [RectificationProcessor(value)],
    }
    if model.num_parameters() < _SMALL:
        makers["contrastive, no cache"] = lambda: [ContrastiveProcessor(model, use_cache=False)]

    def generate(make: Callable[[], list[Any]]) -> Callable[[], object]:
        return lambda: model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            logits_processor=make(),
        )

    found = interleaved({name: generate(make) for name, make in makers.items()}, repeats)
    return {name: {**row, "ms_per_token": round(row["ms"] / new, 3)} for name, row in found.items()}


def pictures(repeats: int) -> dict[str, Any]:
    """Cost of safety guidance on a random Stable Diffusion whose UNet dominates."""
    pipe = tiny_pipelines.stable_diffusion()
    pipe.unet = tiny_pipelines.unet(block_out_channels=(128, 256), sample_size=32)

    def paint() -> object:
        return pipe("a cat", num_inference_steps=4, guidance_scale=5.0, output_type="latent")

    def guided() -> object:
        with SafetyGuidance("max").during(pipe):
            return paint()

    return interleaved({"bare": paint, "safety guidance": guided}, repeats)


def say(what: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')}  {what}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--smollm2", action="store_true", help="with SmolLM2-135M-Instruct as well")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="2 repeats: whether it works")
    options = parser.parse_args()
    if options.repeats < 20:
        parser.error("a median needs at least 20 runs; --quick takes 2, to see that it works")
    repeats = 2 if options.quick else options.repeats
    models = {"tiny llama": (tiny_llama(0, 1000), options.new_tokens)}
    if options.smollm2:
        from safeguard import smollm2

        models["SmolLM2-135M-Instruct bf16"] = smollm2.load()[0], options.new_tokens // 2
    result: dict[str, Any] = {
        "machine": {**describe_machine(), "threads": torch.get_num_threads()},
        "repeats": repeats,
        "prompt_tokens": options.prompt_tokens,
    }
    for name, (model, new) in models.items():
        for batch in options.batch:
            say(f"{name}, batch {batch}")
            found = language(model, batch, options.prompt_tokens, new, repeats)
            result[f"{name}, batch {batch}, {new} tokens"] = found
    say("safety guidance")
    result["safety guidance, random UNet"] = pictures(repeats)
    text = json.dumps(result, indent=2)
    sys.stdout.write(text + "\n")
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
