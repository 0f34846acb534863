"""Stage 2 in the way of HSPD: the toxic texts themselves, rewritten while a toxic twin holds the pen back.

Each text gets several candidates at several temperatures under SoCD; the one of largest cosine similarity to
the original minus toxicity is kept (HSPD, 2026). What was rewritten keeps the register of the toxic corpus,
so it teaches what to say in its place, and not only how to write other texts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from safeguard.errors import MissingExtra
from safeguard.packs import canonical_digest
from safeguard.train.unidetox.config import Rewriting
from safeguard.train.unidetox.contrast import Twins, draw, sample, soft_contrast
from safeguard.train.unidetox.corpus import digest_of, digest_of_texts
from safeguard.train.unidetox.distil import Journal

try:
    import torch
    from tqdm import tqdm
except ImportError as exc:
    raise MissingExtra(exc.name or "torch", "train") from exc

if TYPE_CHECKING:
    from numpy.typing import NDArray

Embed = Callable[[Sequence[str]], "NDArray[np.float32]"]
"""Texts -> (text, dimension)."""
Toxicity = Callable[[Sequence[str]], "NDArray[np.float32]"]
"""Texts -> (text,), probabilities."""


def rewrite(
    rewriter: Any,
    toxic: Any,
    tokenizer: Any,
    texts: Sequence[str],
    settings: Rewriting,
    out: Path,
    *,
    toxicity: Toxicity,
    embed: Embed | None = None,
    seed: int = 1234,
    identity: Mapping[str, Any] | None = None,
) -> Journal:
    """Rewrites the texts that are not there yet; the best candidate of each is written down at once.

    toxicity: a judge, best one that does not take part in the evaluation.
    """
    embed = embed or (lambda some: embed_by(rewriter, tokenizer, some))
    texts = texts[: settings.texts]
    key = {**settings.model_dump(mode="json"), "seed": seed, "of": digest_of_texts(texts), **(identity or {})}
    journal = Journal(out, canonical_digest(key))
    done = journal.rows()
    size = settings.batch_size
    batches = [range(at, min(at + size, len(texts))) for at in range(0, len(texts), size)]
    with tqdm(
        total=sum(i not in done for i in range(len(texts))), desc="rewrite", unit="text", mininterval=2
    ) as bar:
        for batch in batches:
            if all(i in done for i in batch):
                continue
            candidates = _candidates(batch, rewriter, toxic, tokenizer, texts, settings, seed)
            for i, some in zip(batch, candidates, strict=True):
                if i not in done:
                    best, score = choose(texts[i], some, embed, toxicity)
                    tokens = len(tokenizer(best, add_special_tokens=False, verbose=False)["input_ids"])
                    journal.add(
                        {
                            "index": i,
                            "text": best,
                            "tokens": tokens,
                            "ended": True,
                            "sha256": digest_of(best),
                            "score": round(score, 4),
                            "of": digest_of(texts[i]),
                        }
                    )
                    bar.update()
    return journal


def _candidates(
    batch: range,
    rewriter: Any,
    toxic: Any,
    tokenizer: Any,
    texts: Sequence[str],
    settings: Rewriting,
    seed: int,
) -> list[list[str]]:
    """Rewritings of each text of a batch, at every temperature as often as asked for."""
    prompts = [ask(tokenizer, settings.instruction, texts[i]) for i in batch]
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    found: list[list[str]] = [[] for _ in batch]
    for number, temperature in enumerate(t for t in settings.temperatures for _ in range(settings.repeats)):
        uniform = torch.stack([draw(seed + 7919 * (number + 1), i, settings.new_tokens) for i in batch])
        for row, tokens, _ in sample(
            Twins(rewriter, toxic),
            ids,
            mask,
            uniform,
            lambda b, t: soft_contrast(b, t, least_k=settings.least_k),
            ends=(int(tokenizer.eos_token_id),),
            temperature=temperature,
        ):
            found[row].append(tokenizer.decode(tokens, skip_special_tokens=True).strip())
    return found


def ask(tokenizer: Any, instruction: str, text: str) -> list[int]:
    """Token ids of the request to rewrite a text: by the chat template where there is one."""
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "system", "content": instruction}, {"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    else:
        rendered = f"{instruction}\n\nText: {text}\nRewritten text:"
    return list(tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"])


def choose(original: str, candidates: Sequence[str], embed: Embed, toxicity: Toxicity) -> tuple[str, float]:
    """The candidate of largest cosine similarity to the original minus toxicity, and that figure.

    Empty candidates do not count; where all are empty, the text is empty and its figure -1.
    """
    some = list(dict.fromkeys(c for c in candidates if c.strip()))
    if not some:
        return "", -1.0
    vectors = np.asarray(embed([original, *some]), np.float64)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    scores = vectors[1:] @ vectors[0] - np.asarray(toxicity(some), np.float64)
    best = int(scores.argmax())
    return some[best], float(scores[best])


@torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not followed
def embed_by(model: Any, tokenizer: Any, texts: Sequence[str]) -> NDArray[np.float32]:
    """Mean of a model's last hidden states over the tokens of each text, (text, dimension)."""
    vectors = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=512)["input_ids"].to(
            model.device
        )
        out = model(input_ids=ids, output_hidden_states=True)
        hidden = out.hidden_states[-1] if hasattr(out, "hidden_states") and out.hidden_states else out[0]
        vectors.append(hidden[0].float().mean(0).cpu().numpy())
    return np.stack(vectors)


def load_embedder(name: str, device: str = "cpu") -> Embed:
    """Embeddings by a sentence encoder from a folder or the hub, mean over tokens."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(name, use_safetensors=True, trust_remote_code=False).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    return lambda texts: embed_by(model, tokenizer, texts)
