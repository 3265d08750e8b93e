"""A chapter's README: its commands, what it says they print, and whether they do."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def blocks(chapter: str) -> list[tuple[str, str]]:
    """[(command, lines shown under it)]."""
    text = (ROOT / chapter / "README.md").read_text(encoding="utf-8")
    return re.findall(r"```bash\n(.+?)\n```\n(?:```\n(.*?)```)?", text, re.DOTALL)


def short_names(chapter: str) -> list[str]:
    return [command.replace(f"{chapter}/", "") for command, _ in blocks(chapter)]


def demos_without_a_command(chapter: str) -> list[str]:
    commands = " ".join(command for command, _ in blocks(chapter))
    return [demo.name for demo in sorted((ROOT / chapter).glob("demo_*.py")) if demo.name not in commands]


def run(command: str, shown: str) -> None:
    """Run it as a reader would; the shown lines must come in this order, and may go on with numbers that vary."""
    program, *args = command.split()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    argv = {"python": [sys.executable], "torchrun": torchrun}[program] + args
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines, at = done.stdout.splitlines(), 0
    for line in shown.splitlines():
        found = [i for i in range(at, len(lines)) if lines[i].startswith(line)]
        assert found, f"{line!r} is not printed after line {at} of\n{done.stdout}"
        at = found[0] + 1
