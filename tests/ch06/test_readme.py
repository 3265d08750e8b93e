"""Every command of the chapter's README runs, and prints what the README shows."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "ch06_tp_vllm" / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.+?)\n```\n(?:```\n(.*?)```)?", README, re.DOTALL)


def test_the_readme_has_a_command_for_every_demo():
    commands = " ".join(command for command, _ in BLOCKS)
    for demo in sorted((ROOT / "ch06_tp_vllm").glob("demo_*.py")):
        assert demo.name in commands


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("command", "shown"), BLOCKS, ids=[command.replace("ch06_tp_vllm/", "") for command, _ in BLOCKS]
)
def test_the_command_prints_what_is_shown(command, shown):
    program, *args = command.split()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    argv = {"python": [sys.executable], "torchrun": torchrun}[program] + args
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines, at = done.stdout.splitlines(), 0
    for line in shown.splitlines():  # in this order; a line may go on with numbers that differ from run to run
        found = [i for i in range(at, len(lines)) if lines[i].startswith(line)]
        assert found, f"{line!r} is not printed after line {at} of\n{done.stdout}"
        at = found[0] + 1
