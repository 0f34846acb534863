"""The policy: the only holder of thresholds and actions, kept as a file under version control."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from safeguard.errors import PolicyError, UnknownName
from safeguard.files import write_whole
from safeguard.types import Action, Stage

Probability = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(gt=0, le=3600)]
Surface = Literal["t2i", "llm", "text", "image"]

MAX_FILE_BYTES = 1_000_000
"""A policy is a page of text; more than this is a mistake or an attack."""

PRESETS = ("monitor", "lenient", "standard", "strict")

_USELESS: dict[tuple[str, Action], str] = {
    ("input", Action.REGENERATE): "refine or block",
    ("input", Action.REPLACE): "refine or block",
    ("image", Action.REDACT): "replace or block",
}
"""(stage or surface, action) that cannot be carried out there -> what can."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch(cls, value: Any) -> Any:
        if isinstance(value, bool):  # would be taken for 0 or 1: `threshold: yes` would never flag a thing
            raise ValueError("must not be true or false (YAML reads yes, no, on and off so)")
        return value


class Rule(_Part):
    """What holds for one category, where it differs from the surface."""

    threshold: Probability | None = None
    """Flagged at this score or above; None: the check's calibrated threshold, else that of the surface."""
    action: Action | None = None


class Rules(_Part):
    """What is judged on one surface, and what happens to what is flagged."""

    checks: tuple[str, ...] = ()
    """Model packs, or `kind:argument` such as `blocklist:words.txt`.

    Loaded when the surface is first needed.
    """
    optional_checks: tuple[str, ...] = ()
    """Used where their packs are installed; `safeguard doctor` says which are."""
    action: Action = Action.BLOCK
    threshold: Probability = 0.5
    categories: dict[str, Rule] = Field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    """Categories that are scored and reported but not judged; shell patterns such as `llm*`."""

    def threshold_of(self, category: str, calibrated: Mapping[str, float]) -> float | None:
        """Threshold of a category, None where it is not judged."""
        rule = self.categories.get(category)
        if rule is None and any(fnmatchcase(category, pattern) for pattern in self.ignore):
            return None
        if rule is not None and rule.threshold is not None:
            return rule.threshold
        return calibrated.get(category, self.threshold)

    def action_of(self, category: str) -> Action:
        """Action for a flagged category."""
        rule = self.categories.get(category)
        return self.action if rule is None or rule.action is None else rule.action


class InputRules(_Part):
    """Prompts: to an image generator (t2i) and to a language model (llm)."""

    t2i: Rules = Rules()
    llm: Rules = Rules()


class OutputRules(_Part):
    """Results: text and images (video counts as its frames)."""

    text: Rules = Rules()
    image: Rules = Rules()


class StreamRules(_Part):
    """How streamed text is held back.

    `withhold`: nothing is released that was not scored with what follows it; what that promises, and of how
    long a place, is said in `safeguard.held_text`. With these sizes at most 48 tokens of English are held
    back, and what is scored at a time has about as many, which text-guard-s does in about 5 ms.
    """

    mode: Literal["withhold", "sentence", "shadow"] = "withhold"
    hold_chars: Annotated[int, Field(ge=1, le=100_000)] = 96
    """Characters of lookahead that stay back until more text was scored behind them."""
    step_chars: Annotated[int, Field(ge=1, le=100_000)] = 40
    """A check is made each time this much new text has come in."""
    context_chars: Annotated[int, Field(ge=0, le=1_000_000)] = 80
    """Released text that is scored again together with the new."""


class ProbeRules(_Part):
    """A look at pictures while they are made, which saves the rest of the steps where they will be blocked.

    Off while `every` is 0. It never lets anything through: every picture that is handed on was judged when
    it was finished, by the same checks as without a probe.
    """

    every: Annotated[int, Field(ge=0, le=1000)] = 0
    """Steps of the denoising between two looks."""
    from_step: Annotated[int, Field(ge=1, le=1000)] = 10
    """The first step after which there is a look; before it there is little to see."""
    threshold: Probability | None = None
    """Flagged in a preview at this score or above; None: as the finished picture. Previews are blurred, so a
    higher one avoids stopping what would have passed."""
    preview: Literal["vae", "linear"] = "vae"
    """How latents become a picture: through the VAE as at the end, or, for latents of four channels of Stable
    Diffusion 1, 2 and XL, by a linear map, which costs next to nothing and gives an eighth of the size."""
    unavailable: Literal["warn", "error"] = "warn"
    """For a pipeline in whose steps there is nothing to look at or to stop."""


class DecodingRules(_Part):
    """A guard inside the decoding of a language model, on top of the checks, which judge its output as ever.

    `contrastive`: away from an anti-expert, among plausible tokens. `dexperts`: the same within the nucleus,
    with an expert or without. `rectify`: caps on tokens by a value model. Carried out in `generate()` of
    transformers' causal models; reports name the method where it was. See `safeguard.decoding`.
    """

    method: Literal["none", "contrastive", "dexperts", "rectify"] = "none"
    anti_expert: str | None = None
    """Folder or cached hub name of a model trained on harmful text, of the same vocabulary."""
    expert: str | None = None
    """The same of one trained on harmless text; none: the guarded model itself."""
    value_model: str | None = None
    """Folder that `safeguard train value` wrote."""
    strength: Annotated[float, Field(gt=0, le=100)] = 2.0
    """How far from the anti-expert: 2 in DExperts."""
    plausibility: Annotated[float, Field(gt=0, le=1)] | None = None
    """Least share of the likeliest token's probability; None: 0.1 for contrastive, no limit for dexperts."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Nucleus of the guarded model; None: 0.9 for dexperts, no limit for contrastive."""
    epsilon: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Of rectify: taken off every cap."""
    top_k: Annotated[int, Field(ge=1, le=1_000_000)] = 50
    """Of rectify: tokens that remain."""

    @model_validator(mode="after")
    def _has_what_its_method_needs(self) -> Self:
        takes = {
            "none": set(),
            "contrastive": {"anti_expert", "strength", "plausibility", "top_p"},
            "dexperts": {"anti_expert", "expert", "strength", "plausibility", "top_p"},
            "rectify": {"value_model", "epsilon", "top_k"},
        }[self.method]
        needs = {"contrastive": "anti_expert", "dexperts": "anti_expert", "rectify": "value_model"}
        needed = needs.get(self.method)
        if needed is not None and not getattr(self, needed):
            raise ValueError(f"decoding.method {self.method!r} needs {needed}: the folder of a model")
        defaults = type(self).model_fields
        for name in sorted(set(defaults) - takes - {"method"}):
            if getattr(self, name) != defaults[name].default:
                raise ValueError(f"decoding.{name} says nothing to method {self.method!r}")
        return self


class RuntimeRules(_Part):
    """How checks are run when many calls come at once: changes when answers come, not what they are.

    Half precision alone moves scores, by some thousandths.
    """

    batching: Literal["auto", "always", "never"] = "auto"
    """Callers at the same time share runs of a check. auto: on GPUs, where a shared run costs little more."""
    max_items: Annotated[int, Field(ge=1, le=4096)] = 64
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] = 16_384
    """Of one shared run; texts count four characters a token."""
    max_queue: Annotated[int, Field(ge=1, le=1_000_000)] = 1024
    """Items that may wait for one check; what comes beyond is a failure, for on_error to decide."""
    max_wait_s: Seconds | None = None
    """A call whose turn comes later than this fails instead of being answered late."""
    linger_s: Annotated[float, Field(ge=0, le=1)] = 0.0
    """How long a run that follows another at once may wait for company; after a pause none ever waits."""
    cache_entries: Annotated[int, Field(ge=0, le=10_000_000)] = 0
    """Findings of text checks that are kept for texts that come again; 0 keeps none. Never holds a text."""
    cache_bytes: Annotated[int, Field(ge=1, le=100_000_000_000)] = 64_000_000
    torch_run: Literal["eager", "compiled", "cuda_graphs"] = "eager"
    """Of models that torch runs (`hub:`). The last two prepare each shape once, which takes seconds: call
    `warmup()` before serving."""
    torch_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of models that torch runs; half precision is for GPUs. A pack has the precision of its export."""

    @property
    def torch_options(self) -> dict[str, str]:
        """What of this a check whose model torch runs is told, where it differs from the defaults."""
        names = ("torch_run", "torch_dtype")
        return {n: getattr(self, n) for n in names if getattr(self, n) != type(self).model_fields[n].default}


class Policy(_Part):
    """Thresholds, actions and limits. Frozen; cannot exist in a state that says something invalid."""

    name: Annotated[str, Field(min_length=1, max_length=100)] = "custom"
    mode: Literal["enforce", "monitor"] = "enforce"
    """monitor: everything is judged and reported, nothing is changed or withheld."""
    operating_point: str | None = None
    """Which of a check's calibrated thresholds hold where the policy names none.

    Lenient, standard, strict.
    """
    input: InputRules = InputRules()
    output: OutputRules = OutputRules()
    refiner: str | None = None
    on_error: Literal["block", "allow"] = "block"
    """For content that could not be judged. `allow` is logged each time."""
    on_block: Literal["raise", "replace"] = "raise"
    unseen_input: Literal["block", "allow"] = "block"
    """For prompts that no check can see, such as prompt_embeds; the output is checked either way."""
    negative_prompt: Literal["judge", "report"] = "judge"
    """report: negative prompts are scored but never change the action; they often name what they keep out.
    judge: a flagged one blocks, since refining it would turn its meaning round."""
    history: Literal["new", "all"] = "new"
    """Chats: judge only the turns after the last answer, or the whole conversation."""
    max_rounds: Annotated[int, Field(ge=0, le=20)] = 3
    check_timeout_s: Seconds | None = None
    total_timeout_s: Seconds | None = None
    """For all checks and refinements of one call together, without the generation itself."""
    max_chars: Annotated[int, Field(ge=1)] = 100_000
    max_items: Annotated[int, Field(ge=1)] = 4096
    image_tiles: Annotated[int, Field(ge=1, le=4)] = 1
    """Pictures are judged in parts too, so that one set among others counts: 2 looks at the quarters and the
    middle, at 6 times the cost of a picture; 3 at 9 parts and 4 between them, 14 times; 4: 26 times."""
    image_turns: Literal[1, 4] = 1
    """4: pictures are judged turned by 90, 180 and 270 degrees too; 3 looks more."""
    placeholder_text: str = ""
    placeholder_image: Literal["blank", "blur"] = "blank"
    stream: StreamRules = StreamRules()
    runtime: RuntimeRules = RuntimeRules()
    probe: ProbeRules = ProbeRules()
    decoding: DecodingRules = DecodingRules()

    @field_validator("operating_point")
    @classmethod
    def _point_is_a_word(cls, point: str | None) -> str | None:
        if point is not None and not point.strip():
            raise ValueError("operating_point must be a name such as 'standard', got an empty text")
        return point

    @model_validator(mode="after")
    def _actions_can_be_carried_out(self) -> Self:
        for stage, surface, rules in (
            ("input", "t2i", self.input.t2i),
            ("input", "llm", self.input.llm),
            ("output", "text", self.output.text),
            ("output", "image", self.output.image),
        ):
            for where, action in [("action", rules.action)] + [
                (f"categories.{c}.action", rule.action) for c, rule in rules.categories.items() if rule.action
            ]:
                better = _USELESS.get((stage, action)) or _USELESS.get((surface, action))
                if better:
                    raise ValueError(
                        f"{stage}.{surface}.{where}: {action.value!r} cannot be done here; use {better}"
                    )
        return self

    def rules(self, stage: Stage, surface: Surface) -> Rules:
        """The rules of one surface: (input, t2i), (input, llm), (output, text) or (output, image)."""
        part: InputRules | OutputRules = self.input if stage == "input" else self.output
        rules = getattr(part, surface, None)
        if not isinstance(rules, Rules):
            raise ValueError(f"no surface {surface!r} at stage {stage!r}")
        return rules

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the policy in canonical JSON; equal policies have equal digests."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @classmethod
    def preset(cls, name: str) -> Policy:
        """One of the policies that ship with the package: monitor, lenient, standard, strict."""
        if name not in PRESETS:
            raise UnknownName("preset", name, PRESETS)
        text = (resources.files("safeguard") / "data" / "presets" / f"{name}.yaml").read_text(
            encoding="utf-8"
        )
        return cls.from_text(text, "yaml", where=f"preset {name}")

    @classmethod
    def from_file(cls, path: str | Path) -> Policy:
        """Read a policy from `.yaml`, `.yml`, `.toml` or `.json`.

        Raises PolicyError, or OSError as open does.
        """
        path = Path(path)
        form = _form(path)
        if path.stat().st_size > MAX_FILE_BYTES:
            raise PolicyError(
                f"{path.name} is larger than {MAX_FILE_BYTES} bytes; a policy is a page of text"
            )
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as exc:
            raise PolicyError(f"{path.name} is not UTF-8 text (byte {exc.start})") from exc
        return cls.from_text(text, form, where=path.name)

    @classmethod
    def from_text(cls, text: str, form: Literal["yaml", "toml", "json"], *, where: str = "policy") -> Policy:
        """Read a policy from text. Unknown keys are refused, naming the nearest known one."""
        from safeguard.policy_files import parse  # parsers are slow to import, so only when a file is read

        return cls.from_data(parse(text, form, where), where=where)

    @classmethod
    def from_data(cls, data: Any, *, where: str = "policy") -> Policy:
        """Build a policy from plain data, with the errors of a file."""
        if not isinstance(data, Mapping):
            raise PolicyError(f"{where} must hold keys and values at its top, got {type(data).__name__}")
        try:
            return cls.model_validate(data)
        except ValidationError as exc:
            raise PolicyError(f"{where}: " + "; ".join(map(_explain, exc.errors()))) from exc

    def to_text(self, form: Literal["yaml", "toml", "json"]) -> str:
        """Write the policy so that reading it back gives an equal one.

        Only what differs from the defaults.
        """
        from safeguard.policy_files import dump

        return dump(self.model_dump(mode="json", exclude_defaults=True), form)

    def to_file(self, path: str | Path) -> None:
        """Write to `.yaml`, `.yml`, `.toml` or `.json`, at once or not at all."""
        path = Path(path)
        write_whole(Path(os.path.realpath(path)), self.to_text(_form(path)))


def _form(path: Path) -> Literal["yaml", "toml", "json"]:
    match path.suffix.lower():
        case ".yaml" | ".yml":
            return "yaml"
        case ".toml":
            return "toml"
        case ".json":
            return "json"
        case suffix:
            raise PolicyError(
                f"policy files end in .yaml, .yml, .toml or .json, got {suffix or 'no ending'!r}"
            )


def _explain(error: Any) -> str:
    """One pydantic error as our kind of message: where, what is wrong, what would be right."""
    place = [str(part) for part in error["loc"]]
    if error["type"] != "extra_forbidden":
        message = str(error["msg"]).removeprefix("Value error, ")
        got = f", got {error['input']!r}" if isinstance(error["input"], str | int | float | bool) else ""
        return (".".join(place) + ": " if place else "") + message + got
    known = _keys_at(place[:-1])
    near = difflib.get_close_matches(place[-1], known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}" if near else f"known: {', '.join(known)}"
    inside = f" in {'.'.join(place[:-1])}" if place[:-1] else ""
    return f"unknown key {place[-1]!r}{inside}; {hint}"


def _keys_at(place: list[str]) -> list[str]:
    """Known keys of the part of a policy at a dotted place."""
    model: type[BaseModel] = Policy
    for part in place:
        field = model.model_fields.get(part)
        if field is None:  # a name chosen by the user, under `categories`
            model = Rule
            continue
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            model = field.annotation
    return sorted(model.model_fields)
