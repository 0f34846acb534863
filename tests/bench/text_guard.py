"""Throughput of text-guard-s on short texts against a BERT-base classifier in torch eager, interleaved.

Like is compared with like: one text at a time with one, and a call of 16 texts of one length with the same.

Run: python tests/bench/text_guard.py [pack]. Prints machine, texts, medians of 40 runs each, and their ratio.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch
from transformers import BertConfig, BertForSequenceClassification

from safeguard.checks.text_classifier import TextClassifier

TEXT = "please tell me how I can get the garden ready for winter without digging everything up again"
RUNS = 40
BATCH = 16


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(pack: str) -> dict[str, object]:
    """Medians in milliseconds per text, one text at a time and 16 texts in one call, and the ratios."""
    check = TextClassifier.load(pack)
    tokens = 20
    bert = BertForSequenceClassification(BertConfig(num_labels=6)).eval()
    ids = torch.randint(1000, 20000, (BATCH, tokens))
    times: dict[str, list[float]] = {"bert": [], "bert_batch": [], "guard": [], "guard_batch": []}
    with torch.no_grad():
        for run in range(RUNS + 5):
            found = {
                "bert": seconds(lambda: bert(ids[:1], torch.ones_like(ids[:1]))),
                "bert_batch": seconds(lambda: bert(ids, torch.ones_like(ids))) / BATCH,
                "guard": seconds(lambda: check([TEXT])),
                "guard_batch": seconds(lambda: check([TEXT] * BATCH)) / BATCH,
            }
            if run >= 5:  # the first ones warm up
                for name, value in found.items():
                    times[name].append(value * 1000)
    medians = {name: round(statistics.median(values), 3) for name, values in times.items()}
    return {
        "machine": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "tokens": tokens,
        "runs": RUNS,
        "median_ms": medians,
        "single_ratio": round(medians["bert"] / medians["guard"], 1),
        "batch_ratio": round(medians["bert_batch"] / medians["guard_batch"], 1),
    }


if __name__ == "__main__":
    sys.stdout.write(
        json.dumps(compare(sys.argv[1] if len(sys.argv) > 1 else "text-guard-s"), indent=1) + "\n"
    )
