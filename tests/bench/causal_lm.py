"""SmolLM2-135M-Instruct through torch, onnxruntime and onnxruntime-genai: same answers, and how fast.

    python -m tests.bench.causal_lm [--repeats 20] [--work FOLDER] [--json FILE] [--quick]

Exports it (a minute for onnxruntime, ten seconds for genai; kept in --work for the next time), then: greedy
answers of 24 tokens to five prompts against torch, perplexity of 400 tokens of our licence, and milliseconds
per token, the runtimes taking turns.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from safeguard import smollm2
from safeguard.bench.machine import describe_machine
from safeguard.exporters.causal_lm import export_causal_lm
from safeguard.exporters.genai import export_genai
from safeguard.manifest import MANIFEST_NAME
from safeguard.refiners.genai_lm import GenaiLM
from safeguard.refiners.language_model import EMBEDDED_BASE, LanguageModel
from safeguard.refiners.onnx_lm import DecoderLayout, OnnxLM, feeds
from safeguard.refiners.torch_lm import TorchLM

PROMPTS = (
    "Tell me about the sea.",
    "Write one sentence about a small robot.",
    "What do I need to bake bread?",
    "Describe a quiet harbour at dawn.",
    "Why do leaves fall in autumn?",
)
NEW_TOKENS, TEXT_TOKENS, PROMPT_TOKENS = 24, 400, 64
REFERENCE = "torch-float32"
Logits = Callable[[list[int]], Any]


def answers(model: LanguageModel) -> list[str]:
    rows = [model.encode(model.render([{"role": "user", "content": p}]) or p) for p in PROMPTS]
    return [model.generate([row], [NEW_TOKENS])[0].text for row in rows]


def quality(reference: Any, logits: Any, row: list[int]) -> dict[str, float]:
    """Perplexity of a row, and how often the likeliest next token is the reference's."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    logs = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    given = logs[np.arange(len(row) - 1), row[1:]]
    same = (logits.argmax(axis=-1) == reference.argmax(axis=-1)).mean()
    return {"perplexity": float(np.exp(-given.mean())), "top1_agreement": float(same)}


def milliseconds(model: LanguageModel, row: list[int]) -> tuple[float, float]:
    """Of the prompt with its first token, and of each further token."""
    start = time.perf_counter()
    model.generate([row], [1])
    first = time.perf_counter()
    model.generate([row], [17])
    end = time.perf_counter()
    return (first - start) * 1e3, ((end - first) - (first - start)) / 16 * 1e3


def exported(work: Path) -> dict[str, Path]:
    """Folders of the exports, made where they are missing."""
    folders = {name: work / name for name in ("onnx-float32", "onnx-int8-weights", "genai-int8")}
    if not (folders["genai-int8"] / MANIFEST_NAME).is_file():
        say("exporting genai-int8")
        export_genai(EMBEDDED_BASE, folders["genai-int8"])
    if not all((folder / MANIFEST_NAME).is_file() for folder in folders.values()):
        model, tokenizer = smollm2.load(dtype="float32")
        for name in ("float32", "int8-weights"):
            if not (folders[f"onnx-{name}"] / MANIFEST_NAME).is_file():
                say(f"exporting onnx-{name}")
                export_causal_lm(model, tokenizer, folders[f"onnx-{name}"], dtype=name)
    return folders


def onnx_logits(model: OnnxLM, folder: Path) -> Logits:
    layout = DecoderLayout.read(folder / "decoder.json")

    def run(row: list[int]) -> Any:
        ids = np.array([row], dtype=np.int64)
        return model.backend({**feeds(layout, ids, np.ones_like(ids)), **layout.empty(1)})["logits"][0]

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="2 repeats: whether it works")
    options = parser.parse_args()
    if options.repeats < 20:
        parser.error("a median needs at least 20 runs; --quick takes 2, to see that it works")
    repeats = 2 if options.quick else options.repeats
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(exported(options.work or Path(scratch)), repeats)
    text = json.dumps(result, indent=2, ensure_ascii=False)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")


def measure(folders: Mapping[str, Path], repeats: int) -> dict[str, Any]:
    """Answers, perplexity and times of every runtime, the first of which is the reference."""
    contenders = opened(folders)
    models = {name: found for name, (found, _) in contenders.items()}
    reference, read = contenders[REFERENCE]
    licence = (Path(smollm2.__file__).parent / "LICENSE").read_text(encoding="utf-8")
    row = reference.encode(" ".join(licence.split()))[:TEXT_TOKENS]
    prompt = reference.encode(" ".join(PROMPTS) * 2)[:PROMPT_TOKENS]
    wanted, expected = answers(reference), read(row)
    times = timed(models, prompt, repeats)
    table: dict[str, dict[str, Any]] = {}
    for name, (found, logits) in contenders.items():
        say(f"answers and perplexity: {name}")
        told = wanted if found is reference else answers(found)
        first, each = (statistics.median(column) for column in zip(*times[name], strict=True))
        table[name] = {
            "same_answers": sum(a == b for a, b in zip(wanted, told, strict=True)),
            **quality(expected, logits(row), row),
            "prompt_ms": round(first, 1),
            "token_ms": round(each, 2),
            "times_torch": faster(times[REFERENCE], times[name]),
        }
    return {
        "machine": {**describe_machine(), "threads": torch.get_num_threads()},
        "prompt_tokens": len(prompt),
        "text_tokens": len(row),
        "answers": len(PROMPTS),
        "repeats": repeats,
        "models": table,
    }


def opened(folders: Mapping[str, Path]) -> dict[str, tuple[LanguageModel, Logits]]:
    """Each runtime with its model, and what gives the logits of a whole row."""
    found: dict[str, tuple[LanguageModel, Logits]] = {}
    for dtype in ("float32", "bfloat16"):
        model, tokenizer = smollm2.load(dtype=dtype)
        found[f"torch-{dtype}"] = TorchLM(model, tokenizer), torch_logits(model)
    for name in ("onnx-float32", "onnx-int8-weights"):
        lm = OnnxLM.load(folders[name])
        found[name] = lm, onnx_logits(lm, folders[name])
    genai = GenaiLM.load(folders["genai-int8"])
    found["genai-int8"] = genai, genai.logits
    return found


def torch_logits(model: Any) -> Logits:
    def run(row: list[int]) -> Any:
        with torch.inference_mode():
            return model(torch.tensor([row])).logits[0].float().numpy()

    return run


def timed(
    models: Mapping[str, LanguageModel], prompt: list[int], repeats: int
) -> dict[str, list[tuple[float, float]]]:
    """`milliseconds` of each model in each repeat, in an order drawn anew each time."""
    for model in models.values():
        model.generate([prompt], [4])  # warm
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    order = random.Random(0)
    for turn in range(repeats):
        say(f"round {turn + 1} of {repeats}")
        for name in order.sample(list(models), len(models)):
            times[name].append(milliseconds(models[name], prompt))
    return times


def faster(reference: list[tuple[float, float]], own: list[tuple[float, float]]) -> float:
    """How many times faster a token is than the reference's: the median of the ratios of each repeat."""
    return round(statistics.median(a / b for (_, a), (_, b) in zip(reference, own, strict=True)), 2)


def say(what: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')}  {what}\n")


if __name__ == "__main__":
    main()
