"""The template that a refiner run trained with, also where only a checkpoint of it is at hand."""

from __future__ import annotations

import json
from pathlib import Path

from safeguard.errors import PackError
from safeguard.refiners.template import FILE_NAME, RefinerTemplate

RUN = "run.json"


def template_of(folder: Path) -> RefinerTemplate | None:
    """That of an adapter's folder, or of the run above a checkpoint; None where nothing says.

    Raises PackError for a run.json that cannot be read, ValueError where a run had another template than the
    one that is found now.
    """
    if (folder / FILE_NAME).is_file():
        return RefinerTemplate.read(folder / FILE_NAME)
    for run in (folder, folder.parent.parent):  # a checkpoint lies in run/checkpoints/
        if (run / RUN).is_file():
            return _trained_with(run)
    return None


def _trained_with(run: Path) -> RefinerTemplate:
    try:
        facts = json.loads((run / RUN).read_text(encoding="utf-8"))
        own, version = facts["config"].get("template"), facts["template"]
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise PackError(f"{run / RUN} describes no refiner run") from exc
    if (run / FILE_NAME).is_file():
        template = RefinerTemplate.read(run / FILE_NAME)
    else:
        template = RefinerTemplate.model_validate(own) if own else RefinerTemplate.default()
    if template.version != version:
        raise ValueError(f"the run had template {version!r}, found {template.version!r}")
    return template
