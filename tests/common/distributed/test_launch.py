"""How scripts end: several starts under one torchrun, Ctrl-C, a full disk, a reader that has seen enough."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import warm

ROOT = Path(__file__).parents[3]
MODULE = "tests.common.distributed.under_torchrun"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", MODULE]


@pytest.fixture
def two_ranks(tmp_path):
    """two_ranks(name) -> what they print, and on stderr, as torchrun's ranks."""

    def run(*name: str) -> tuple[str, str]:
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        both = warm.Torchrun(["-m", MODULE, *name], 2, ROOT, env, tmp_path)
        return both.finish(200)[1:]

    return run


def script(*name: str, torchrun: bool, stdout=subprocess.PIPE, unbuffered: bool = False) -> subprocess.Popen:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | ({"PYTHONUNBUFFERED": "1"} if unbuffered else {})
    argv = [*TORCHRUN, *name] if torchrun else [sys.executable, "-m", MODULE, *name]
    return subprocess.Popen(argv, cwd=ROOT, env=env, stdout=stdout, stderr=subprocess.PIPE, text=True)


def test_a_script_may_end_without_shutdown():
    """The threads of a group that is still there aborted one process in five, so there are many."""
    argv = [arg.replace("=2", "=8") for arg in TORCHRUN]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*argv, "end_without_a_word"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=200, check=False
    )
    assert (done.returncode, done.stdout) == (0, "8\n" * 8), done.stderr


def test_torchrun_s_ranks_start_and_shut_down_again(two_ranks):
    out, err = two_ranks("start_and_shut_down", "10")
    assert out == "10 times\n" * 2, err


@pytest.mark.parametrize(
    "name", ["rank_1_shuts_down_and_goes_on", "rank_1_comes_to_its_end", "rank_1_ends_itself_in_its_engine"]
)
def test_a_rank_that_makes_fewer_calls_is_named_and_not_called_dead(name, two_ranks):
    _, err = two_ranks(name)
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    left = "rank 1 has left and makes no such call; every rank must make the same calls"
    assert said == [f"error: rank 0: all_reduce 'y' [4] failed: {left}"], err


def test_a_rank_that_leaves_its_engine_by_an_exception_is_named_with_it(two_ranks):
    _, err = two_ranks("rank_1_fails_in_its_engine")
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    assert said == ["error: rank 0: all_reduce 'y' [4] failed: rank 1 has left with KeyError: 'of rank 1'"], err


def test_a_rank_that_ends_with_an_exception_has_died(two_ranks):
    _, err = two_ranks("rank_1_fails")
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert re.search(r"^error: rank 0.* rank 1 \(pid \d+\) has died$", said[0]), err


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_to_torchrun_is_one_line_a_rank(name):
    """What else is printed is torchrun's own: that it got the signal, and where in its own code."""
    process = script("talk_for_ever", torchrun=True)
    assert [process.stdout.readline() for _ in range(2)] == ["talking\n"] * 2
    process.send_signal(signal.Signals[name])
    out, err = process.communicate(timeout=200)
    ours, _, torchruns = err.partition("Traceback (most recent call last):\n")
    ours = sorted(line for line in ours.splitlines() if "torch/distributed/elastic" not in line and line.strip())
    assert out == ""
    for rank in range(
        2
    ):  # a rank that waited in a collective hears of its peer's end before Python tells it of the signal
        stopped, bereaved = (
            rf"rank {rank}: stopped \({name}\)",
            rf"error: rank {rank} is stopped because rank \d \(pid \d+\) has died",
        )
        assert sum(bool(re.fullmatch(f"{stopped}|{bereaved}", line)) for line in ours) == 1, ours
    assert len(ours) == 2
    assert any(f"stopped ({name})" in line for line in ours)
    assert "Traceback" not in torchruns
    assert "common/" not in torchruns


def test_a_script_of_another_clone_than_the_one_that_is_imported_says_so(tmp_path):
    for name in ("common/distributed/launch.py", "ch06_tp_vllm/demo.py"):
        (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "clone" / name).touch()
    demo = "from common.distributed.launch import run_main\nrun_main(lambda: print('ran'))\n"
    said = []
    for place in (tmp_path / "clone" / "ch06_tp_vllm", tmp_path):
        (place / "demo.py").write_text(demo, encoding="utf-8")
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, place / "demo.py"], env=env, capture_output=True, text=True, timeout=200, check=False
        )
        said.append((done.returncode, done.stdout, done.stderr))
    clone, root = (re.escape(str(folder)) for folder in ((tmp_path / "clone").resolve(), ROOT))
    assert said[0][:2] == (1, "")
    assert re.fullmatch(
        rf"error: this script is of {clone}, but .* of {root}, .* or set PYTHONPATH={clone}\n", said[0][2]
    )
    assert said[1] == (0, "ran\n", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no file that is always full")
@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize("name", ["print_much", "print_little"])
def test_a_full_standard_output_is_named(name, unbuffered):
    with open("/dev/full", "w", encoding="utf-8") as full:
        process = script(name, torchrun=False, stdout=full, unbuffered=unbuffered)
        _, err = process.communicate(timeout=200)
    assert (process.returncode, err) == (1, "error: standard output: No space left on device\n")


def test_a_reader_that_closes_the_pipe_is_no_error():
    process = script("print_much", torchrun=False)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    process.wait(timeout=200)
