"""What every training recipe shares: a frozen configuration, and the versions that a run was made with."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict


class Recipe(BaseModel):
    """A configuration that cannot exist in a wrong state; files are TOML with the field names as keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def read(cls, path: Path) -> Self:
        """The configuration in a TOML file. Raises pydantic's ValidationError naming every wrong key."""
        return cls.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))


def versions(*packages: str) -> dict[str, str]:
    """Package -> installed version."""
    return {name: metadata.version(name) for name in packages}
