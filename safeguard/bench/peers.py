"""What others would use, each as it is shipped: made by `worker.py` in a process with any Python that has it.

Imports nothing of ours, since the peers' environments do not have it. Where a package itself is not there,
its code path is written out with the file and the lines that it was read from, and `about` says so.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from importlib import metadata
from types import SimpleNamespace
from typing import Any

Payload = dict[str, Any]
_LIBRARIES = ("transformers", "torch", "onnxruntime", "optimum-onnx", "tokenizers", "diffusers")


class Peer:
    """A contender and what it is made of. by_one: called once for each text instead of with all of them."""

    def __init__(
        self,
        call: Callable[[Any], Any],
        *packages: str,
        by_one: bool = False,
        prepare: Callable[[Payload], Any] | None = None,
    ) -> None:
        self._call, self._by_one = call, by_one
        self.about = {"versions": _versions((*packages, *_LIBRARIES))}
        self.prepare = prepare or (lambda payload: payload["texts"])

    def __call__(self, items: Any) -> None:
        """One run over all items."""
        if not self._by_one:
            self._call(items)
            return
        for item in items:
            self._call(item)


def torch_eager(options: dict[str, Any]) -> Peer:
    """The plainest way: tokenizer, model, sigmoid, one text at a time, so that nothing is ever padded."""
    import torch

    model, tokenizer = _model(options["source"])

    def call(text: str) -> Any:
        inputs = tokenizer(text, return_tensors="pt", truncation=True)
        with torch.no_grad():
            return torch.sigmoid(model(**inputs).logits).tolist()

    return Peer(call, by_one=True)


def pipeline(options: dict[str, Any]) -> Peer:
    """`transformers.pipeline("text-classification")` on a list, with its own batch size of 1."""
    import transformers

    model, tokenizer = _model(options["source"])
    call = transformers.pipeline(
        "text-classification",
        model=model,
        tokenizer=tokenizer,
        top_k=None,
        function_to_apply="sigmoid",
        truncation=True,
    )
    return Peer(call)


def detoxify(options: dict[str, Any]) -> Peer:
    """`Detoxify.predict` of the real class, given our weights in place of its download.

    options: source; by_one, one call for each text instead of one with all. detoxify/detoxify.py 0.5.4, lines
    17-35 make the model and the (slow) BertTokenizer, 113-126 are predict.
    """
    import transformers
    from detoxify import Detoxify

    made = object.__new__(Detoxify)  # its constructor downloads a checkpoint
    model, _ = _model(options["source"])
    made.__dict__.update(
        model=model,
        tokenizer=transformers.BertTokenizer.from_pretrained(options["source"]),
        class_names=list(model.config.id2label.values()),
        device="cpu",
    )
    return Peer(made.predict, "detoxify", by_one=options.get("by_one", False))


def detoxify_path(options: dict[str, Any]) -> Peer:
    """What Detoxify.predict does (detoxify/detoxify.py 0.5.4, lines 113-126), without the package."""
    import torch

    model, tokenizer = _model(options["source"])
    names = list(model.config.id2label.values())

    def predict(text: Any) -> Any:
        with torch.no_grad():
            inputs = tokenizer(text, return_tensors="pt", truncation=True, padding=True).to(model.device)
            scores = torch.sigmoid(model(**inputs)[0]).cpu()
        return {name: scores[:, i].squeeze().tolist() for i, name in enumerate(names)}

    return Peer(predict, by_one=options.get("by_one", False))


def llm_guard(options: dict[str, Any]) -> Peer:
    """llm-guard's own Toxicity scanner with `use_onnx=True`, exported by optimum from our weights.

    Its pipeline options are those of its default model (llm_guard/input_scanners/toxicity.py 0.3.16, lines
    13-27: padding to 512), untouched but for token types, which its RoBERTa has not and BERT's graph wants.
    """
    from llm_guard.input_scanners import toxicity
    from llm_guard.util import configure_logger

    configure_logger("ERROR")
    default = toxicity.DEFAULT_MODEL
    model = dataclasses.replace(
        default,
        path=options["source"],
        revision=None,
        onnx_path=None,
        onnx_revision=None,
        pipeline_kwargs={**default.pipeline_kwargs, "return_token_type_ids": True},
    )
    scanner = toxicity.Toxicity(model=model, use_onnx=True)
    return Peer(scanner.scan, "llm-guard", by_one=True)


def llm_guard_path(options: dict[str, Any]) -> Peer:
    """What that scanner computes (same lines), without the package: each text padded to 512, onnxruntime.

    options: source, and graph, a float32 ONNX file of the same weights.
    """
    import numpy as np
    import onnxruntime
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(options["source"])
    session = onnxruntime.InferenceSession(options["graph"], providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]

    def scan(text: str) -> Any:
        inputs = tokenizer(text, return_tensors="np", padding="max_length", truncation=True, max_length=512)
        logits = session.run(None, {name: inputs[name].astype(np.int64) for name in names})[0]
        return (1 / (1 + np.exp(-logits))).tolist()

    return Peer(scan, by_one=True)


def safety_checker(options: dict[str, Any]) -> Peer:
    """Diffusers' safety checker as its pipelines call it, and with `q16` a second CLIP for Q16's prompts.

    diffusers' `run_safety_checker`: the feature extractor on PIL pictures, then the checker on its pixels.
    Q16 (Schramowski et al. 2022) preprocesses and encodes by itself: a second tower of the same size.
    """
    import numpy as np
    import torch
    import transformers
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    checker = StableDiffusionSafetyChecker.from_pretrained(options["source"]).eval()
    second = None  # not loaded where it is not used: memory is measured, too
    if options["q16"]:
        second = StableDiffusionSafetyChecker.from_pretrained(options["source"]).eval()
    size = checker.config.vision_config.image_size
    edges = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    extract = transformers.CLIPImageProcessor(**edges)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.nn.functional.normalize(
        torch.randn(2, checker.config.projection_dim, generator=generator), dim=-1
    )

    def check(images: list[Any]) -> Any:
        pixels = extract(images, return_tensors="pt").pixel_values
        found = checker(images=[np.asarray(image) for image in images], clip_input=pixels)
        if second is None:
            return found
        with torch.no_grad():
            pixels = extract(images, return_tensors="pt").pixel_values
            embeds = second.visual_projection(second.vision_model(pixels)[1])
            unit = torch.nn.functional.normalize(embeds, dim=-1)
            return found, (100 * unit @ prompts.T).softmax(dim=-1).tolist()

    return Peer(check, prepare=_pictures)


def openai_guardrails(options: dict[str, Any]) -> Peer:
    """openai-guardrails around its keyword check, the cheapest that it ships. Payload: text and calls."""
    from guardrails import instantiate_guardrails
    from guardrails.runtime import load_config_bundle, run_guardrails

    bundle = {
        "version": 1,
        "guardrails": [{"name": "Keyword Filter", "config": {"keywords": ["zzzzzz"]}}],
    }
    guards = instantiate_guardrails(load_config_bundle(bundle))
    context = SimpleNamespace(guardrail_llm=None)  # a keyword check asks no model

    async def calls(payload: Payload) -> None:
        for _ in range(payload["calls"]):
            await run_guardrails(
                ctx=context, data=payload["text"], media_type="text/plain", guardrails=guards
            )

    return Peer(_in_a_loop(calls), "openai-guardrails", prepare=_same)


def guardrails_ai(options: dict[str, Any]) -> Peer:
    """guardrails-ai around a validator that passes everything. Payload: text and calls.

    Its reports of use and its tracing are off: by default each call would wait for them.
    """
    from guardrails import Guard, OnFailAction
    from guardrails.settings import settings
    from guardrails.validators import PassResult, Validator, register_validator

    settings.rc.enable_metrics = False
    settings.disable_tracing = True

    @register_validator(name="bench/trivial", data_type="string")
    class Trivial(Validator):  # type: ignore[misc]  # not installed where types are checked
        def _validate(self, value: Any, metadata: Any = None) -> Any:
            return PassResult()

    guard = Guard().use(Trivial(on_fail=OnFailAction.EXCEPTION))

    def calls(payload: Payload) -> None:
        for _ in range(payload["calls"]):
            guard.validate(payload["text"])

    return Peer(calls, "guardrails-ai", prepare=_same)


def nemo_guardrails(options: dict[str, Any]) -> Peer:
    """NeMo Guardrails with one input rail, an action that allows everything. Payload: text and calls."""
    from nemoguardrails import LLMRails, RailsConfig

    colang = """
define subflow trivial
  $allowed = execute allow_everything
  if not $allowed
    bot refuse to respond
    stop
"""
    config = RailsConfig.from_content(
        colang_content=colang, yaml_content="models: []\nrails:\n  input:\n    flows:\n      - trivial\n"
    )
    rails = LLMRails(config)

    async def allow_everything() -> bool:
        return True

    rails.register_action(allow_everything, "allow_everything")
    only_input = {"rails": ["input"]}

    async def calls(payload: Payload) -> None:
        message = [{"role": "user", "content": payload["text"]}]
        for _ in range(payload["calls"]):
            await rails.generate_async(messages=message, options=only_input)

    return Peer(_in_a_loop(calls), "nemoguardrails", prepare=_same)


def _model(source: str) -> tuple[Any, Any]:
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(source).eval()
    return model, transformers.AutoTokenizer.from_pretrained(source)


def _pictures(payload: Payload) -> list[Any]:
    import numpy as np
    from PIL import Image

    found = []
    for seed in payload["pictures"]:  # as in ours.py
        coarse = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)
        found.append(Image.fromarray(coarse).resize((512, 512), Image.Resampling.BICUBIC))
    return found


def _same(payload: Payload) -> Payload:
    return payload


def _in_a_loop(calls: Callable[[Payload], Any]) -> Callable[[Payload], None]:
    """Calls in one event loop that stays, as in a server."""
    runner = asyncio.Runner()
    return lambda payload: runner.run(calls(payload))


def _versions(names: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
