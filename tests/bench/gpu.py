"""Everything that can be measured on a machine with an NVIDIA GPU, in one go, into one JSON file.

    python tests/bench/gpu.py --out results.json [--quick] [--budget-s 520]
    python tests/bench/gpu.py --out results.json --cpu-rehearsal

Versions and device, measured ceilings (copies, products), text classifiers of two sizes and the CLIP tower
with seven heads through torch eager, torch.compile, our CUDA graphs (with and without inductor's kernels),
then exports, onnxruntime and TensorRT where they are there. Weights are random: speed is the same, accuracy
is not claimed. Runs take turns, at least 20 each. A section that cannot run says why and the others go on;
the file is whole after each of them. With --cpu-rehearsal all of it runs on a CPU, with tiny models and
without capturing graphs, so that only the calls to CUDA are left unproven.

Needs torch, transformers, tokenizers, numpy, pydantic and pillow; onnx, onnxscript, onnxruntime-gpu,
TensorRT as far as they are to be measured.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUDGET_S = 520.0
_TARGETS = {  # issue of record: what an H200 is to reach
    "text, one string": "1 ms p50 end to end",
    "text, 128 tokens": "20,000 sequences/s",
    "image, tensor on the device": "2 ms p50 and 2,500 images/s",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all sections; 0 when every one of them was run or skipped, 1 when one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="nothing long begins after it")
    parser.add_argument("--cpu-rehearsal", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--only", default="", help="names of sections, with commas between")
    options = parser.parse_args(arguments)
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    missing = _missing()
    if missing:
        print(f"missing: {', '.join(missing)}; install them first", file=sys.stderr)  # noqa: T201
        return 2
    import torch

    from tests.bench.gpu_parts.measuring import Bench, table

    if not options.cpu_rehearsal and not torch.cuda.is_available():
        print("torch sees no NVIDIA GPU; --cpu-rehearsal runs the script without one", file=sys.stderr)  # noqa: T201
        return 2
    torch._dynamo.config.recompile_limit = 512  # beyond 8 shapes it would run plain code, with a warning only
    device = "cpu" if options.cpu_rehearsal else "cuda"
    bench = Bench(options.out, device, options.cpu_rehearsal, options.quick, options.budget_s)
    bench.results["targets on an H200"] = _TARGETS
    with tempfile.TemporaryDirectory() as work, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of exporters and compilers, by the hundred
        _run(bench, Path(work), {name for name in options.only.split(",") if name})
    print(table(bench.results))  # noqa: T201
    return int(any(isinstance(r, dict) and "failed" in r for r in bench.results.values()))


def _run(bench, work: Path, only: set[str]) -> None:  # type: ignore[no-untyped-def]  # its module needs numpy
    from tests.bench.gpu_parts import exported, facts, image, text

    sections = {
        "facts": facts.facts,
        "ceilings": facts.ceilings,
        "text": text.toxic_section,
        "image": image.image_section,
        "guard": text.guard_section,
        "export": partial(exported.export_section, work=work),
        "exported": partial(exported.exported_section, work=work),
        "autotune": text.autotune_section,
    }
    unknown = only - set(sections)
    if unknown:
        raise SystemExit(f"no section {', '.join(sorted(unknown))}; known: {', '.join(sections)}")
    for name, work_of in sections.items():
        if not only or name in only:
            bench.section(name, work_of)


def _missing() -> list[str]:
    import importlib.util

    needed = ("torch", "transformers", "tokenizers", "numpy", "pydantic", "PIL")
    return [name for name in needed if importlib.util.find_spec(name) is None]


if __name__ == "__main__":
    sys.exit(main())
