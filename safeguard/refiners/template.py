"""The instruction that a refining language model was trained with: a file beside its weights."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

from safeguard.errors import PackError
from safeguard.files import write_whole

FILE_NAME = "refiner_template.json"
_PLACE = "{prompt}"
_CURRENT = "{current}"


class RefinerTemplate(BaseModel):
    """How a prompt is put to the model, and how long an answer may be.

    user holds `{prompt}` once, and at most once `{current}`: the prompt that drew the picture shown.
    keep: the answer that means "leave it", in lower case. A rewrite may have max(length_floor, length_factor
    times the prompt) tokens, at most max_new_tokens; what is longer is cut at a word.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Annotated[str, Field(min_length=1)]
    system: str = ""
    user: str = _PLACE
    keep: Annotated[str, Field(min_length=1)] = "keep"
    max_new_tokens: Annotated[int, Field(gt=0, le=4096)] = 128
    length_factor: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2.0
    length_floor: Annotated[int, Field(gt=0)] = 77  # tokens of a CLIP text encoder
    stop: tuple[str, ...] = ()
    source: str = ""
    licence: str = ""

    @field_validator("user")
    @classmethod
    def _one_place(cls, user: str) -> str:
        if user.count(_PLACE) != 1:
            raise ValueError(f"user must hold {_PLACE} exactly once, got {user.count(_PLACE)} times")
        if user.count(_CURRENT) > 1:
            raise ValueError(f"user may hold {_CURRENT} once, got {user.count(_CURRENT)} times")
        return user

    @field_validator("keep")
    @classmethod
    def _plain(cls, keep: str) -> str:
        if keep != keep.strip().lower():
            raise ValueError(f"keep must be in lower case without blanks around it, got {keep!r}")
        return keep

    @classmethod
    def read(cls, path: Path) -> RefinerTemplate:
        """The template in a JSON file. Raises PackError naming the file when it is none."""
        return cls._parse(path.read_text(encoding="utf-8"), str(path))

    @classmethod
    def default(cls) -> RefinerTemplate:
        """The template in the package, for models that bring none; refiners of ours are trained with it."""
        return cls._shipped(FILE_NAME)

    @classmethod
    def for_pictures(cls) -> RefinerTemplate:
        """The template in the package for models that are shown the picture too."""
        return cls._shipped("vlm_template.json")

    @classmethod
    def _shipped(cls, name: str) -> RefinerTemplate:
        file = resources.files("safeguard") / "data" / name
        return cls._parse(file.read_text(encoding="utf-8"), name)

    @classmethod
    def _parse(cls, text: str, where: str) -> RefinerTemplate:
        try:
            return cls.model_validate(json.loads(text))
        except (ValueError, RecursionError) as exc:
            raise PackError(f"{where} is not a refiner template: {exc}") from exc

    def fill(self, prompt: str, current: str | None = None) -> str:
        """The user's turn. The prompts are put in as data: braces in them mean nothing.

        current: what the picture was drawn from, the prompt itself when None.
        """
        parts = re.split(f"({_PLACE}|{_CURRENT})", self.user)
        known = {_PLACE: prompt, _CURRENT: prompt if current is None else current}
        return "".join(known.get(part, part) for part in parts)

    def messages(self, prompt: str, current: str | None = None) -> list[dict[str, str]]:
        """The chat turns before the answer; no system turn where `system` is empty."""
        turns = [{"role": "user", "content": self.fill(prompt, current)}]
        return [{"role": "system", "content": self.system}, *turns] if self.system else turns

    def limit(self, prompt_tokens: int) -> int:
        """Tokens that a rewrite of a prompt of so many tokens may have."""
        return min(self.max_new_tokens, max(self.length_floor, int(self.length_factor * prompt_tokens)))

    def write(self, path: Path) -> None:
        """Write it as JSON, to lie beside the weights."""
        write_whole(path, json.dumps(self.model_dump(mode="json"), indent=2) + "\n")
