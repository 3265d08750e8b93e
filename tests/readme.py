"""A chapter's README: its commands, what it says they print, and whether they do."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


MEASURED = "\f"  # before a line whose numbers differ from run to run
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]\d+)?x?")


def blocks(chapter: str) -> list[tuple[str, str]]:
    """[(command, lines shown under it)]. MEASURED is before the lines of a ```measured block: any number may stand for each."""
    text = (ROOT / chapter / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"```bash\n(.+?)\n```\n((?:```(?:measured)?\n.*?```\n)*)", text, re.DOTALL)
    return [
        (command, "".join(map(_lines, re.findall(r"```(measured)?\n(.*?)```\n", shown, re.DOTALL))))
        for command, shown in found
    ]


def _lines(block: tuple[str, str]) -> str:
    kind, lines = block
    return re.sub(r"^(?=.)", MEASURED, lines, flags=re.MULTILINE) if kind else lines


def short_names(chapter: str) -> list[str]:
    return [command.replace(f"{chapter}/", "") for command, _ in blocks(chapter)]


def demos_without_a_command(chapter: str) -> list[str]:
    commands = " ".join(command for command, _ in blocks(chapter))
    return [demo.name for demo in sorted((ROOT / chapter).glob("demo_*.py")) if demo.name not in commands]


def links(chapter: str) -> set[str]:
    """What the README links to, without the place in it."""
    text = (ROOT / chapter / "README.md").read_text(encoding="utf-8")
    return {target.partition("#")[0] for target in re.findall(r"\]\((\S+?)\)", text)}


def run(command: str, shown: str) -> None:
    """Run it as a reader would; the shown lines must come in this order, and may go on with numbers that vary."""
    program, *args = command.split()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    argv = {"python": [sys.executable], "torchrun": torchrun}[program] + args
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines, at = done.stdout.splitlines(), 0
    for line in shown.split("\n"):
        alike = re.compile(_any_numbers(line[1:]) if line.startswith(MEASURED) else re.escape(line))
        found = [i for i in range(at, len(lines)) if alike.match(lines[i])]
        assert found or not line, f"nothing like {line!r} is printed after line {at} of\n{done.stdout}"
        at = found[0] + 1 if line else at


def _any_numbers(line: str) -> str:
    """The line as a regular expression: any number in the place of each, as much space as it needs."""
    words = [r"\s+".join(re.escape(word) for word in re.split(r"\s+", text)) for text in NUMBER.split(line)]
    return NUMBER.pattern.join(words)
