"""A small model of how harmful a text will be when it is finished, for every token that could come next."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

from safeguard.errors import MissingExtra, PackError

try:
    import torch
    from safetensors.torch import load_file, save_file
    from torch import Tensor, nn
    from transformers import AutoConfig, AutoModel
    from transformers.modeling_outputs import CausalLMOutputWithPast
except ImportError as exc:
    raise MissingExtra(exc.name or "transformers", extra="torch") from exc

FORMAT = 1
"""Of value.json; raised when what a folder holds changes."""


class ValueModel(nn.Module):  # type: ignore[misc]  # torch is not followed
    """A causal trunk and a head of two layers that gives Q(row, token) in [-1, 0].

    Q is minus the probability that the finished text is harmful if that token comes next.
    Source: Cao et al. 2023 (dead-end rectification); the sigmoid, which keeps the range, is ours.
    """

    def __init__(self, trunk: nn.Module, vocabulary: int, *, width: int | None = None) -> None:
        super().__init__()
        size = int(trunk.config.hidden_size)
        self.width = width or 2 * size
        self.trunk, self.vocabulary = trunk, vocabulary
        self.head = nn.Sequential(nn.Linear(size, self.width), nn.ReLU(), nn.Linear(self.width, vocabulary))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head[0].weight.device

    def get_input_embeddings(self) -> Any:
        """The trunk's table of tokens."""
        return self.trunk.get_input_embeddings()

    def hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """States of the trunk (row, token, hidden)."""
        return self.trunk(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
    ) -> Any:
        """`logits`: Q (row, token, token of the vocabulary), of the last logits_to_keep tokens or all."""
        out = self.trunk(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        states = out.last_hidden_state[:, -logits_to_keep:]
        return CausalLMOutputWithPast(
            logits=-torch.sigmoid(self.head(states).float()), past_key_values=out.past_key_values
        )

    def save(self, folder: Path) -> None:
        """Write config.json, value.json and model.safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        self.trunk.config.save_pretrained(folder)
        about = {"format": FORMAT, "vocabulary": self.vocabulary, "width": self.width}
        (folder / "value.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        weights = {name: value.detach().contiguous() for name, value in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors")

    @classmethod
    def load(cls, folder: Path, *, device: Any = "cpu") -> Self:
        """The model that `save` wrote, in evaluation mode. Raises PackError for anything else."""
        try:
            about = json.loads((folder / "value.json").read_text(encoding="utf-8"))
            if about["format"] != FORMAT:
                raise PackError(f"value.json has format {about['format']!r}, expected {FORMAT}")
            trunk = AutoModel.from_config(
                AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            )
            model = cls(trunk, int(about["vocabulary"]), width=int(about["width"]))
            model.load_state_dict(load_file(folder / "model.safetensors"))
        except (OSError, KeyError, TypeError, ValueError, RuntimeError) as exc:
            raise PackError(f"{folder.name!r} holds no value model ({type(exc).__name__})") from exc
        model.to(device).eval()
        return model
