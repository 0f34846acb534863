"""The README of an exported Triton repository: how to start the server, how to ask it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from safeguard.packs import Pack

_TEMPLATE = """# {name} on NVIDIA Triton

{summary}

Made by safeguard {version} from the pack `{name}` {pack_version}, digest `{digest}`.
Every file's SHA-256 is in `safeguard-triton.json`. The steps carry the modules of safeguard that they need,
so it need not be installed.

| model | what it does |
| --- | --- |
{rows}

## Start

The python steps need {needs} in the image:

```
FROM nvcr.io/nvidia/tritonserver:<year>.<month>-py3
RUN pip install {install}
```

```
docker build -t triton-{tag} .
docker run --rm {gpus}--shm-size 1g -p 8000:8000 -p 8001:8001 -p 8002:8002 \\
  -v "$PWD":/models:ro triton-{tag} tritonserver --model-repository=/models
```

Python in the image must be 3.11 or later. {runtime}

## Ask

```python
import numpy as np
import tritonclient.http as http

client = http.InferenceServerClient("localhost:8000")
{example}
asked = http.InferInput("{input}", [len(items)], "BYTES")
asked.set_data_from_numpy(np.array(items, dtype=object))
scores = client.infer("{name}", [asked]).as_numpy("SCORES")  # (item, label)
labels = {labels}
print([dict(zip(labels, row.tolist())) for row in scores])
```

Scores are probabilities; higher is riskier. {points}

## What to know

* A request that cannot be judged is answered with an error, never with scores: {errors}. Treat an error as
  "not allowed".
* {semantics}
* The thresholds are the caller's; nothing here blocks anything.
"""
_ISOLATED = (
    "The model is int8: each window has a run of its own (`max_batch_size: 1`), because such a model scales "
    "its activations over the whole run and neighbours would change a verdict. Raise `count` in the instance "
    "group of the model for more throughput, not the batch. Triton's onnxruntime fuses layers that "
    "safeguard's own backend leaves alone, which was seen to move int8 scores by up to 3e-5."
)
_BATCHED = (
    "Rows of several callers share a run; that changes scores by rounding only (about 1e-6 in float32)."
)


def readme(pack: Pack, record: Mapping[str, Any]) -> str:
    """The text for one repository."""
    manifest, is_text = pack.manifest, pack.manifest.kind == "text_classifier"
    ensemble, first, second, model = record["models"]
    unit = "readings of texts, cut into windows of tokens" if is_text else "views of pictures, as pixels"
    rows = [
        (ensemble, "ensemble; ask this one"),
        (first, unit),
        (second, "calls the model, takes the worst row of each item, calibrates"),
        (model, f"the model, {manifest.precision}, on the {record['device'].upper()}"),
    ]
    packages = ("numpy", "tokenizers", "emoji") if is_text else ("numpy", "pillow", "pydantic")
    points = ", ".join(record["operating_points"])
    opset = manifest.export.opset if manifest.export else None
    runtime = "The TensorRT of the image must be the one that built the engine."
    if pack.model.suffix == ".onnx":
        runtime = "The image's onnxruntime must know the graph's opset"
        runtime += f" ({opset}); opset 23 needs onnxruntime 1.23." if opset else "."
    return _TEMPLATE.format(
        name=manifest.name,
        tag=manifest.name.lower(),
        summary=manifest.summary or f"A {manifest.kind.replace('_', ' ')}.",
        version=record["safeguard"],
        pack_version=manifest.version,
        digest=pack.digest,
        rows="\n".join(f"| `{model}` | {text} |" for model, text in rows),
        needs=", ".join(packages),
        install=" ".join(f"'{name}=={metadata.version(name)}'" for name in packages),
        gpus="--gpus all " if record["device"] == "gpu" else "",
        runtime=runtime,
        input="TEXT" if is_text else "IMAGE",
        example='items = ["Good morning!".encode()]'
        if is_text
        else 'items = [open("photo.jpg", "rb").read()]',
        labels=json.dumps(record["labels"]),
        points=f"Calibrated thresholds ({points}) are in `safeguard-triton.json`." if points else "",
        errors="text that is not UTF-8 or too long" if is_text else "a file that is no picture, or too large",
        semantics=_ISOLATED if record["isolated"] else _BATCHED,
    )
