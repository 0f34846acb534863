from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from safeguard.bench import worker
from safeguard.bench.process import Start, Worker, workers
from safeguard.bench.timing import ContenderFailed

FACTORIES = """
import os
import sys
import time


def echo(options):
    print("chatter that is no answer")
    return lambda payload: {"said": [options["word"], payload]}


def sleepy(options):
    def work(payload):
        time.sleep(payload)
    work.prepare = lambda payload: time.sleep(0.3) or payload
    return work


def stuck(options):
    time.sleep(60)


def clumsy(options):
    def work(payload):
        if payload == "die":
            sys.stderr.write("last words")
            sys.stderr.flush()
            os._exit(3)
        raise ValueError("no such thing")
    return work


def absent(options):
    import a_module_that_nobody_has
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "factories.py"
    path.write_text(FACTORIES, encoding="utf-8")
    return path


def started(file: Path, factory: str, **options: object) -> Worker:
    made = Worker(Start(factory, file, factory, dict(options)), log=file.with_suffix(".log"))
    made.wait()
    return made


def test_a_call_is_answered_with_its_time_and_what_it_gave() -> None:
    out = io.StringIO()

    worker.serve(lambda payload: {"double": payload * 2}, io.StringIO("21\n4\n"), out)

    answers = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [answer["double"] for answer in answers] == [42, 8]
    assert all(answer["seconds"] >= 0 for answer in answers)


def test_a_call_may_give_its_own_time() -> None:
    out = io.StringIO()

    worker.serve(lambda _: {"seconds": 7.5}, io.StringIO("0\n"), out)

    assert json.loads(out.getvalue())["seconds"] == 7.5


def test_a_contender_gets_options_and_payload_and_may_print(file: Path) -> None:
    with started(file, "echo", word="moin") as running:
        sample = running({"texts": ["ä"]}, items=2)

    assert sample.more == {"said": ["moin", {"texts": ["ä"]}]}
    assert sample.items == 2


def test_preparing_is_not_timed(file: Path) -> None:
    with started(file, "sleepy") as running:
        sample = running(0.0)

    assert sample.seconds < 0.25  # prepare sleeps 0.3 s


def test_a_call_that_raises_says_why_and_the_next_one_is_answered(file: Path) -> None:
    with started(file, "clumsy") as running:
        with pytest.raises(ContenderFailed, match="ValueError: no such thing"):
            running("raise")
        with pytest.raises(ContenderFailed, match="ValueError: no such thing"):
            running("raise")


def test_a_process_that_dies_is_an_error_with_its_last_words(file: Path) -> None:
    with (
        started(file, "clumsy") as running,
        pytest.raises(ContenderFailed, match=r"the process ended: .*last words"),
    ):
        running("die")


def test_a_contender_that_hangs_is_given_up(file: Path) -> None:
    start = Start("stuck", file, "stuck")
    with (
        Worker(start, log=file.with_suffix(".log"), patience_s=0.5) as running,
        pytest.raises(ContenderFailed, match="the process ended"),
    ):
        running.wait()


def test_what_cannot_be_started_is_named_with_its_reason(file: Path) -> None:
    starts = [
        Start("good", file, "echo", {"word": "a"}),
        Start("absent", file, "absent"),
        Start("no python", file, "echo", python=str(file.parent / "nothing")),
    ]
    with workers(starts, file.parent / "logs") as (running, failed):
        names = list(running)

    assert names == ["good"]
    assert "No module named 'a_module_that_nobody_has'" in failed["absent"]
    assert "No such file" in failed["no python"]


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_peak_memory_is_this_process_own(file: Path) -> None:
    ballast = bytearray(200_000_000)
    with started(file, "echo", word="a") as running:
        peak = running.peak_mb

    assert len(ballast) > 0
    assert peak is not None
    assert 1 < peak < 150  # a bare Python; the parent's 200 MB are not in it


def test_the_worker_imports_nothing_of_ours() -> None:
    source = Path(worker.__file__).read_text(encoding="utf-8")

    assert "import safeguard" not in source
    assert "from safeguard" not in source
