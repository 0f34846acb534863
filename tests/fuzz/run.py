"""Fuzzing from the command line: very many inputs without a crash, a hang or memory growth.

`python tests/fuzz/run.py --inputs 100000 --seed 1 --target normalisation` goes on where `results.json` says
that seed and target stopped, and adds its counts there. `--again` starts from the first input. A finding
makes the exit code 1; its seed and number are kept in results.json and give the input again (`--show NUMBER`
writes it to standard output).

`--million` runs all targets up to the numbers of inputs in MILLION. `--engine atheris` lets coverage steer
the inputs (`pip install atheris`). Such a run is a process of its own, and a finding is a file that libFuzzer
leaves in the folder `--findings`.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import platform
import re
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # run as a file
    sys.path.insert(0, str(ROOT))

from tests.fuzz.corpus import mutated, seeds, words  # noqa: E402
from tests.fuzz.targets import SECONDS, TARGETS  # noqa: E402
from tests.load.memory import MACHINE, growth_percent, settled_rss  # noqa: E402

RESULTS = Path(__file__).with_name("results.json")
MILLION = {
    "normalisation": 150_000,
    "blocklist": 40_000,
    "windows": 350_000,
    "window_texts": 60_000,
    "policy": 60_000,
    "manifest": 200_000,
    "jsonl": 80_000,
    "image": 60_000,
}
"""Inputs for each target in `--million`, about ten minutes of one core."""
_STEP = 1000  # inputs between two looks at the memory
_WARM = 4  # this part of the inputs fills caches before the memory is watched: a quarter
_WALL = 30  # times the processor time: libFuzzer's limit is by the clock, and the machine may be busy
_ARTIFACTS = ("crash-", "timeout-", "oom-", "leak-")  # files that libFuzzer leaves of a finding
_HARD_S = 300  # the process is ended with its stacks when a step takes this long


class Hang(BaseException):
    """An input took more processor time than its target may."""


def _ring(number: int, frame: FrameType | None) -> None:
    raise Hang


@dataclass
class Run:
    """What a run of one target saw.

    outcomes: name -> count. findings: (number, what was raised). rss: kilobytes after each step from warm on.
    """

    target: str
    seed: int
    first: int
    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[tuple[int, str]] = field(default_factory=list)
    slowest_ms: float = 0.0
    slowest: int = 0
    rss: list[int] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for results.json."""
        return {
            "seed": self.seed,
            "inputs": sum(self.outcomes.values()),
            "next": self.first + sum(self.outcomes.values()),
            "outcomes": dict(sorted(self.outcomes.items())),
            "findings": [{"number": n, "raised": what} for n, what in self.findings],
            "slowest_ms": round(self.slowest_ms, 1),
            "slowest_input": self.slowest,
            "rss_growth_percent": growth_percent(self.rss),
        }


def one(target: Callable[[bytes], str], data: bytes, seconds: float) -> str:
    """What came of one input. Raises Hang after `seconds` of processor time, and whatever is a finding."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        return target(data)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def fuzz(name: str, seed: int, first: int, inputs: int) -> Run:
    """Run `inputs` mutated inputs of a target, from number `first` on."""
    run, target, seconds = Run(name, seed, first), TARGETS[name], SECONDS[name]
    before = signal.signal(signal.SIGPROF, _ring)
    try:
        for number in range(first, first + inputs):
            done = number - first
            if done % _STEP == 0:
                faulthandler.dump_traceback_later(_HARD_S, exit=True)
                if done >= inputs // _WARM:
                    run.rss.append(settled_rss())
            data = mutated(seed, name, number)
            started = time.process_time()
            try:
                outcome = one(target, data, seconds)
            except (Exception, Hang) as exc:
                outcome = f"FINDING {type(exc).__name__}"
                run.findings.append((number, _place(exc)))
            run.outcomes[outcome] += 1
            ms = (time.process_time() - started) * 1e3
            if ms > run.slowest_ms:
                run.slowest_ms, run.slowest = ms, number
        run.rss.append(settled_rss())
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGPROF, before)
    return run


def _place(exc: BaseException) -> str:
    frame = traceback.extract_tb(exc.__traceback__)[-1]
    return f"{type(exc).__name__} at {Path(frame.filename).name}:{frame.lineno} {str(exc)[:200]}"


def merged(old: dict[str, Any] | None, run: Run, *, again: bool) -> dict[str, Any]:
    """The entry of a target with another run added; counts start anew with another seed."""
    new = run.to_dict()
    if old is None or again or old["seed"] != run.seed:
        return new
    outcomes = Counter(old["outcomes"]) + run.outcomes
    slower = old["slowest_ms"] > new["slowest_ms"]
    grown = [g for g in (old["rss_growth_percent"], new["rss_growth_percent"]) if g is not None]
    return new | {
        "inputs": sum(outcomes.values()),
        "outcomes": dict(sorted(outcomes.items())),
        "findings": old["findings"] + new["findings"],
        "slowest_ms": old["slowest_ms"] if slower else new["slowest_ms"],
        "slowest_input": old["slowest_input"] if slower else new["slowest_input"],
        "rss_growth_percent": max(grown, default=None),
    }


def read_results(path: Path) -> dict[str, Any]:
    """What earlier runs left, or nothing."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_results(path: Path, key: str, entries: dict[str, Any]) -> None:
    """Write the entries of one engine, with the machine and the totals, at once."""
    found = read_results(path) | {"machine": MACHINE, "python": platform.python_version(), key: entries}
    found["total_inputs"] = sum(
        entry["inputs"] for engine in ("mutator", "atheris") for entry in found.get(engine, {}).values()
    )
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    part.replace(path)


def run_mutator(names: list[str], args: argparse.Namespace) -> int:
    """Run the targets in turn in this process; 1 when one has findings."""
    found = 0
    for name in names:
        entries = read_results(args.results).get("mutator", {})
        old = entries.get(name)
        first = 0 if old is None or args.again or old["seed"] != args.seed else old["next"]
        inputs = max(MILLION[name] - first, 0) if args.million else args.inputs
        run = fuzz(name, args.seed, first, inputs)
        entries[name] = merged(old, run, again=args.again)
        write_results(args.results, "mutator", entries)
        sys.stdout.write(json.dumps({name: run.to_dict()}) + "\n")
        sys.stdout.flush()
        found += len(run.findings)
    return 1 if found else 0


def run_atheris(names: list[str], args: argparse.Namespace) -> int:
    """Run each target under libFuzzer in a process of its own; 1 when one ended early."""
    worst = 0
    for name in names:
        started = time.monotonic()
        folder = args.findings / name
        (folder / "corpus").mkdir(parents=True, exist_ok=True)
        for i, data in enumerate(seeds(name)):
            (folder / "corpus" / f"seed-{i}").write_bytes(data)
        lines = "".join(f'"{_escaped(word)}"\n' for word in words(name) if word)
        (folder / "words").write_text(lines, encoding="ascii")
        command = [
            *(
                sys.executable,
                __file__,
                "--inside",
                name,
                "--",
                f"-atheris_runs={args.inputs}",
                "-max_len=4096",
            ),
            *(f"-seed={args.seed}", f"-timeout={SECONDS[name] * _WALL:.0f}", "-rss_limit_mb=3000"),
            f"-max_total_time={args.seconds}",
            *(f"-dict={folder / 'words'}", f"-artifact_prefix={folder}/"),
            str(folder / "corpus"),
        ]
        before = set(folder.iterdir())
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        executed = re.search(r"^Done (\d+) (?:runs )?in", done.stderr, re.MULTILINE)
        found = [path for path in set(folder.iterdir()) - before if path.name.startswith(_ARTIFACTS)]
        rss = [int(mb) for mb in re.findall(r" rss: (\d+)Mb", done.stderr)]
        covered = [int(n) for n in re.findall(r" cov: (\d+) ", done.stderr)]
        entries = read_results(args.results).get("atheris", {})
        old = {"inputs": 0, "findings": 0} if args.again else entries.get(name, {"inputs": 0, "findings": 0})
        entries[name] = {
            "inputs": old["inputs"] + (int(executed[1]) if executed else 0),
            "findings": old["findings"] + max(len(found), executed is None),
            "seconds": round(time.monotonic() - started),
            "peak_rss_mb": max(rss, default=None),
            "edges_covered": max(covered, default=None),
        }
        write_results(args.results, "atheris", entries)
        if found or executed is None:
            sys.stdout.write(done.stderr[-4000:])
        sys.stdout.write(json.dumps({name: entries[name]}) + "\n")
        sys.stdout.flush()
        worst = max(worst, int(bool(found) or executed is None))
    return worst


def _escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


def inside_atheris(name: str, options: list[str]) -> None:
    """One target under libFuzzer, with the coverage of our own modules; does not come back."""
    atheris = importlib.import_module("atheris")  # not typed, and only needed here
    wanted = ("safeguard", "yaml", "tomllib", "tests.fuzz")
    for module in [name for name in sys.modules if name.startswith(wanted)]:
        del sys.modules[module]
    with atheris.instrument_imports(include=list(wanted)):
        target = importlib.import_module("tests.fuzz.targets").TARGETS[name]
    atheris.Setup([sys.argv[0], *options], lambda data: target(data) and None)
    atheris.Fuzz()


def main(arguments: list[str] | None = None) -> int:
    """The command line; see the top of the file."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["--inside"]:
        inside_atheris(given[1], given[3:])
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--inputs", type=int, default=10_000, help="per target")
    parser.add_argument(
        "--million", action="store_true", help="all targets, until there are a million in all"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--target", choices=[*TARGETS, "all"], default="all")
    parser.add_argument("--engine", choices=["mutator", "atheris"], default="mutator")
    parser.add_argument("--seconds", type=int, default=0, help="for atheris, per target; 0: no limit")
    parser.add_argument("--again", action="store_true", help="forget earlier counts")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--findings", type=Path, default=Path("scratch/fuzz"), help="for atheris")
    parser.add_argument("--show", type=int, help="write the input of that number and stop")
    args = parser.parse_args(given)
    names = list(TARGETS) if args.target == "all" else [args.target]
    if args.show is not None:
        sys.stdout.buffer.write(mutated(args.seed, names[0], args.show))
        return 0
    warnings.simplefilter("ignore")  # PIL warns of many damaged pictures
    faulthandler.enable()
    return run_atheris(names, args) if args.engine == "atheris" else run_mutator(names, args)


if __name__ == "__main__":
    raise SystemExit(main())
