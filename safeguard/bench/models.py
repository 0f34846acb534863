"""Models with random weights in the shapes of the real ones, as folders of transformers and as our packs.

Random weights cost what trained ones do: every product has the same size. Scores mean nothing, so that an
export agrees is only asked for where it does not depend on the weights (float32).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from safeguard.checks.clip_heads import Concepts, Head, Perceptron, PromptPair
from safeguard.errors import MissingExtra
from safeguard.exporters import clip, text_classifier
from safeguard.exporters.writing import new_folder
from safeguard.packs import resolve

try:
    import torch
    import transformers
except ImportError as exc:
    raise MissingExtra("transformers", "export") from exc

LABELS = ("toxicity", "severe_toxicity", "obscene", "threat", "insult", "identity_attack")
WINDOW = 512
SEED = 0
_WEIGHTS = "model.safetensors"  # written last, so a folder that has it is whole
Say = Callable[[str], None]


def _trunk(hidden: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": hidden * 4,
    }


def _tower(trunk: dict[str, int], image: int, patch: int, projection: int) -> dict[str, int]:
    return {**trunk, "image_size": image, "patch_size": patch, "projection_dim": projection}


TINY_TEXT = _trunk(32, 2, 2)
TOWERS: dict[str, dict[str, int]] = {
    "ViT-B/32": _tower(_trunk(768, 12, 12), 224, 32, 512),
    "ViT-L/14": _tower(_trunk(1024, 24, 16), 224, 14, 768),
    "tiny": _tower(TINY_TEXT, 32, 8, 16),
}


@dataclass(frozen=True)
class Made:
    """Where the same weights lie: for transformers, and as our packs by the numbers in their graphs."""

    source: Path
    float32: Path
    int8: Path


def make_text_models(folder: Path, *, tiny: bool = False, say: Say = lambda _: None) -> Made:
    """A classifier of toxic-bert's architecture (BERT-base, six labels) with text-guard-s's vocabulary.

    What is there already is used again; tiny models lie beside the others, in a folder of their own.
    """
    folder = folder.with_name(f"{folder.name}-tiny") if tiny else folder
    made = Made(folder / "source", folder / "float32", folder / "int8")
    if not (made.source / _WEIGHTS).is_file():
        say("making a random BERT")
        torch.manual_seed(SEED)
        config = transformers.BertConfig(
            id2label=dict(enumerate(LABELS)),
            label2id={label: i for i, label in enumerate(LABELS)},
            problem_type="multi_label_classification",
            **(TINY_TEXT if tiny else {}),
        )
        model = transformers.BertForSequenceClassification(config).eval()
        with new_folder(
            made.source, overwrite=True, marker="config.json"
        ) as aside:  # whole, or made again the next time
            _write_tokenizer(aside)
            model.save_pretrained(aside)
    if not made.int8.is_dir() or not made.float32.is_dir():
        read = text_classifier.read_text_model(made.source)
        export = text_classifier.export_text_classifier
        export(read, made.float32, overwrite=True, fields={"name": "float32"}, say=say)
        export(read, made.int8, dtype="int8", max_flips=1.0, overwrite=True, fields={"name": "int8"}, say=say)
    return made


def make_image_models(folder: Path, tower: str = "ViT-B/32", *, say: Say = lambda _: None) -> Made:
    """A safety checker of diffusers with a random tower, and our packs with that tower and three heads."""
    try:
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    except ImportError as exc:
        raise MissingExtra("diffusers", "diffusers") from exc
    made = Made(folder / "source", folder / "float32", folder / "int8")
    sizes = TOWERS[tower]
    if not (made.source / _WEIGHTS).is_file():
        say(f"making a random safety checker, {tower}")
        torch.manual_seed(SEED)
        vision = transformers.CLIPVisionConfig(**sizes)
        text = transformers.CLIPTextConfig(**(TINY_TEXT if tower == "tiny" else {}))
        config = transformers.CLIPConfig(
            vision_config=vision.to_dict(), text_config=text.to_dict(), projection_dim=sizes["projection_dim"]
        )
        checker = StableDiffusionSafetyChecker(config).eval()
        with torch.no_grad():
            for head in (checker.concept_embeds, checker.special_care_embeds):
                head.normal_()
        with new_folder(made.source, overwrite=True, marker="config.json") as aside:
            checker.save_pretrained(aside)
    if not made.int8.is_dir() or not made.float32.is_dir():
        source = clip.tower(_tower_of(made.source, sizes), name="random-clip")
        heads = random_heads(sizes["projection_dim"])
        clip.export_clip(source, heads, made.float32, overwrite=True, say=say)
        clip.export_clip(source, heads, made.int8, dtype="int8", max_flips=1.0, overwrite=True, say=say)
    return made


def random_heads(dimension: int) -> list[Head]:
    """One head of each kind: Q16's, the safety checker's 17 concepts and 3 special ones, a perceptron."""
    rng = np.random.default_rng(SEED)

    def draw(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(np.float32)

    return [
        PromptPair("q16", draw(2, dimension)),
        Concepts("nsfw", draw(17, dimension), np.full(17, 0.2), draw(3, dimension), np.full(3, 0.2)),
        Perceptron("multi_headed", draw(384, dimension), np.zeros(384), draw(384)),
    ]


def _tower_of(source: Path, sizes: dict[str, int]) -> Any:
    """The checker's own vision tower as the class that the exporter takes: the same weights."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    checker = StableDiffusionSafetyChecker.from_pretrained(source).eval()
    model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**sizes)).eval()
    model.vision_model.load_state_dict(_inner(checker.vision_model).state_dict())
    model.visual_projection.load_state_dict(checker.visual_projection.state_dict())
    return model


def _inner(vision: Any) -> Any:
    return getattr(vision, "vision_model", vision)


def _write_tokenizer(folder: Path) -> None:
    """text-guard-s's vocabulary (that of bert-base-uncased) in every form that the peers read."""
    content = json.loads(resolve("text-guard-s").read("tokenizer.json"))
    content["truncation"] = content["padding"] = None
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    words = sorted(content["model"]["vocab"].items(), key=lambda item: item[1])
    (folder / "vocab.txt").write_text("\n".join(word for word, _ in words) + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "BertTokenizerFast",
        "model_max_length": WINDOW,
        "do_lower_case": True,
        **{f"{name}_token": f"[{name.upper()}]" for name in ("cls", "sep", "pad", "unk", "mask")},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
