"""`safeguard policy`: show, check and compare policies, and print their JSON Schema."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any

import typer

from safeguard.cli.running import CLEAN, FLAGGED

app = typer.Typer(no_args_is_help=True, help="Show, check and compare policies.")

_NAME = "A preset (monitor, lenient, standard, strict) or a policy file."


class Format(StrEnum):
    """Forms of a policy file."""

    yaml = "yaml"
    toml = "toml"
    json = "json"


@app.command("show")
def show(
    policy: Annotated[str, typer.Argument(help=_NAME)],
    form: Annotated[Format, typer.Option("--format", help="Form of the file.")] = Format.yaml,
    full: Annotated[bool, typer.Option("--full", help="Print the defaults as well.")] = False,
) -> None:
    """Print a policy as a file that gives the same policy again."""
    from safeguard import policy_files
    from safeguard.cli.judge import policy_of

    found = policy_of(policy)
    text = policy_files.dump(found.model_dump(mode="json"), form.value) if full else found.to_text(form.value)
    typer.echo(text.rstrip("\n"))


@app.command("schema")
def schema(
    report: Annotated[bool, typer.Option("--report", help="The schema of a report instead.")] = False,
) -> None:
    """Print the JSON Schema of a policy file, or of a report."""
    from safeguard.schemas import policy_schema, report_schema

    typer.echo(json.dumps(report_schema() if report else policy_schema(), indent=2))


@app.command("check")
def check(policy: Annotated[str, typer.Argument(help=_NAME)]) -> None:
    """Read a policy file and say whether it is valid; exit code 2 where it is not. Loads no model."""
    from safeguard.cli.judge import policy_of

    found = policy_of(policy)
    typer.echo(f"valid: policy {found.name} {found.digest[:12]}, mode {found.mode}")


@app.command("diff")
def diff(
    old: Annotated[str, typer.Argument(help=_NAME)],
    new: Annotated[str, typer.Argument(help=_NAME)],
) -> None:
    """Print what differs between two policies, a line each. Exit code 0: nothing, 1: something."""
    from safeguard.cli.judge import policy_of

    before, after = (_flat(policy_of(p).model_dump(mode="json")) for p in (old, new))
    differing = [key for key in (before | after) if before.get(key) != after.get(key)]
    for key in differing:
        typer.echo(f"{key}: {_shown(before, key)} -> {_shown(after, key)}")
    raise typer.Exit(FLAGGED if differing else CLEAN)


def _flat(data: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones; lists are values."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{place}{key}.")
        else:
            flat[place + key] = value
    return flat


def _shown(flat: Mapping[str, Any], key: str) -> str:
    return json.dumps(flat[key], ensure_ascii=False) if key in flat else "absent"
