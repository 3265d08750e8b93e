"""A command of a README that goes wrong is found, in the processes of tests/warm.py as in any."""

import re

import pytest

from tests import warm
from tests.readme import run

SCRIPT = """
import atexit, multiprocessing, os, sys
from beside import HERE

def double(x):
    return 2 * x

if __name__ == "__main__":
    atexit.register(print, "goodbye")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print("arguments", sys.argv[1:], HERE, pool.map(double, [21]))
    if os.environ.get("RANK", "0") == sys.argv[1]:
        sys.exit(f"rank {sys.argv[1]} of {os.environ.get('WORLD_SIZE')} does not like it")
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripts")
    (folder / "says.py").write_text(SCRIPT, encoding="utf-8")
    (folder / "beside.py").write_text("HERE = 'beside it'\n", encoding="utf-8")
    return folder / "says.py"


def test_a_script_says_what_it_would_say_alone(script):
    run(f"python {script} 7 --flag", "arguments ['7', '--flag'] beside it [42]\ngoodbye")
    with pytest.raises(AssertionError, match=re.escape("nothing like 'arguments' is printed after line 2")):
        run(f"python {script} 7", "goodbye\narguments")


def test_a_rank_that_fails_is_a_failure(script):
    run(f"torchrun --nproc_per_node=2 {script} 7", "arguments\ngoodbye\narguments\ngoodbye")
    with pytest.raises(AssertionError, match="rank 1 of 2 does not like it"):
        run(f"torchrun --nproc_per_node=2 {script} 1", "")


def test_a_module_is_run_as_one():
    run("python -m calendar 2026 11", "   November 2026")


BESIDE = """
import subprocess, sys
rank = subprocess.Popen([sys.executable, "-m", "common.distributed.rank_main"], stdin=subprocess.PIPE)
rank.stdin.close()
print(type(rank).__name__, rank.wait(60), subprocess.run([sys.executable, "-c", "print(42)"], capture_output=True).stdout)
"""


@pytest.mark.skipif(not warm.FORK, reason="this system has no fork")
def test_a_rank_that_it_starts_is_forked_and_anything_else_is_not(tmp_path):
    (tmp_path / "starts.py").write_text(BESIDE, encoding="utf-8")
    run(f"python {tmp_path / 'starts.py'}", "_Forked 0 b'42\\n'")
