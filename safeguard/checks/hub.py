"""Text classifiers from the model hub, such as unitary/toxic-bert, run by torch and transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from safeguard.backends import Backend, Precision
from safeguard.checks.readout import Activation, Readout
from safeguard.checks.text_classifier import GPU_TOKENS, TextClassifier
from safeguard.errors import MissingExtra, PackError
from safeguard.manifest import Window
from safeguard.packs import canonical_digest, file_digest, is_offline
from safeguard.runtime.buckets import Buckets

IGNORED_LABELS = frozenset(
    {
        # unitary/unbiased-toxic-roberta's heads for the mention of a group, which is nothing wrong
        *("male", "female", "homosexual_gay_or_lesbian", "christian", "jewish", "muslim", "black", "white"),
        "psychiatric_or_mental_illness",
        # safe classes of classifiers with a softmax
        *(
            "neutral",
            "non-toxic",
            "nontoxic",
            "not_toxic",
            "safe",
            "normal",
            "ok",
            "nothate",
            "not hate",
            "sfw",
        ),
    }
)
"""Labels that are no risk and are left out of the scores."""
RENAMED = {"toxicity": "toxic", "severe_toxicity": "severe_toxic", "identity_attack": "identity_hate"}
"""One name for one thing: Detoxify's names to those of the Jigsaw data and of toxic-bert's own config."""
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_MAX_TOKENS = 512
_STRIDE = 384


def load(
    model: str | Path,
    *,
    name: str | None = None,
    revision: str | None = None,
    device: str = "cpu",
    max_windows: int = 512,
    ignored: Sequence[str] | None = None,
    torch_run: Literal["eager", "compiled", "cuda_graphs"] = "eager",
    torch_dtype: Precision = "float32",
) -> TextClassifier:
    """A sequence classifier with a fast tokenizer, from the hub, its cache or a folder.

    Safetensors only, no code from the hub; with HF_HUB_OFFLINE=1 only the cache is read. ignored: labels of
    the model that are no risk, those known to be by default. torch_run: compiled by torch (inductor), or
    replayed from CUDA graphs; both want `warmup()`. torch_dtype: half precision is for GPUs.
    Raises PackError when there is no such model or its labels say nothing, BackendError for a device that is
    not there or cannot do that, MissingExtra without torch.
    """
    _require_transformers()
    from safeguard.backends.torch import torch_device

    torch_device(device)  # before anything is downloaded
    loaded, tokenizer = _read(model, revision)
    columns = label_columns(loaded.config.id2label, str(model))
    inputs = [n for n in _INPUTS if n in tokenizer.model_input_names]
    window = window_of(loaded.config, tokenizer.model_max_length)
    backend = _backend(
        loaded.eval(),
        inputs,
        Buckets().up_to(window.tokens),
        torch_run=torch_run,
        padding=int(tokenizer.pad_token_id or 0),
        device=device,
        dtype=torch_dtype,
    )
    in_shapes = device != "cpu" or torch_run != "eager"
    return TextClassifier(
        backend,
        tokenizer.backend_tokenizer,
        Readout(columns, ignored=_left_out(columns, ignored), activation=activation_of(loaded.config)),
        window,
        name=name or str(model).rstrip("/").rsplit("/", 1)[-1],
        inputs=inputs,
        digest=_digest(model, loaded.config),
        max_windows=max_windows,
        max_tokens=4096 if device == "cpu" else GPU_TOKENS,
        buckets=Buckets() if in_shapes else None,
    )


def _require_transformers() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError as exc:
        raise MissingExtra("transformers", "torch") from exc


def _read(model: str | Path, revision: str | None) -> tuple[Any, Any]:
    """(classifier, fast tokenizer); PackError where either is not to be had."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    options = {"revision": revision, "local_files_only": is_offline(), "trust_remote_code": False}
    try:
        loaded = AutoModelForSequenceClassification.from_pretrained(model, use_safetensors=True, **options)
        tokenizer = AutoTokenizer.from_pretrained(model, **options)
    except (OSError, ValueError) as exc:
        raise PackError(f"no text classifier could be loaded from {str(model)!r}: {exc}") from exc
    if not getattr(tokenizer, "is_fast", False):
        raise PackError(f"{str(model)!r} has no fast tokenizer (tokenizer.json), so windows cannot be cut")
    return loaded, tokenizer


def _left_out(columns: Sequence[str], ignored: Sequence[str] | None) -> list[str]:
    """The labels that are no risk: those named, or the known ones."""
    if ignored is not None:
        return list(ignored)
    return [column for column in columns if column.lower() in IGNORED_LABELS]


def _backend(
    module: Any,
    inputs: Sequence[str],
    buckets: Buckets,
    *,
    torch_run: str,
    padding: int,
    device: str,
    dtype: Precision,
) -> Backend:
    if torch_run not in ("eager", "compiled", "cuda_graphs"):
        raise ValueError(f"torch_run must be eager, compiled or cuda_graphs, got {torch_run!r}")
    from safeguard.backends.torch import ModuleBackend

    if torch_run != "cuda_graphs":
        compiler = "inductor" if torch_run == "compiled" else None
        return ModuleBackend(
            module, inputs=inputs, outputs=("logits",), device=device, dtype=dtype, compile_with=compiler
        )
    from safeguard.backends.cuda_graphs import GraphBackend, text_inputs
    from safeguard.backends.engine_spec import Buckets as GraphBuckets

    return GraphBackend(
        module,
        inputs=text_inputs(*inputs),
        outputs=("logits",),
        buckets=GraphBuckets(lengths=buckets.lengths),
        device=device,
        dtype=dtype,
        padding={"input_ids": padding},
    )


def label_columns(id2label: Mapping[Any, str], model: str) -> list[str]:
    """Names of the logit columns, in the model's order, under our names.

    Raises PackError for labels that name nothing (LABEL_0): a score without a meaning helps nobody.
    """
    labels = [str(id2label[i]) for i in sorted(id2label)]
    if any(label.upper().startswith("LABEL_") for label in labels):
        raise PackError(f"{model!r} does not name its labels ({', '.join(labels)}); set config.id2label")
    return [RENAMED.get(label.lower(), label.lower()) for label in labels]


def window_of(config: Any, model_max_length: int) -> Window:
    """The longest window that the model reads, its neighbours three quarters of a window apart."""
    positions = int(getattr(config, "max_position_embeddings", _MAX_TOKENS))
    if getattr(config, "model_type", "") in {"roberta", "xlm-roberta", "camembert", "xlm-roberta-xl"}:
        positions -= int(config.pad_token_id) + 1  # their positions are counted from padding_idx + 1
    tokens = min(positions, int(model_max_length), _MAX_TOKENS)
    return Window(tokens=tokens, overlap=tokens * (_MAX_TOKENS - _STRIDE) // _MAX_TOKENS)


def activation_of(config: Any) -> Activation:
    """Independent sigmoids, unless the model was trained with one right answer."""
    return "softmax" if config.problem_type == "single_label_classification" else "sigmoid"


def _digest(model: str | Path, config: Any) -> str:
    """What model this is: its commit on the hub, or the digests of the weights in its folder."""
    files = sorted(Path(model).glob("*.safetensors")) if Path(model).is_dir() else []
    weights = [file_digest(file) for file in files]
    return canonical_digest([weights or str(model), getattr(config, "_commit_hash", None), config.to_dict()])
