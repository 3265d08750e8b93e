"""A chapter's README: its commands, what it says they print, and whether they do."""

import os
import re
import tempfile
from pathlib import Path

from tests import warm

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 400  # for one command; less than a test's own limit, so that what it printed is told

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


def run(command: str | list[str], shown: str) -> None:
    """Run it as a reader would, or its words; the shown lines must come in this order, and may go on with numbers that vary.

    Its processes are those of tests/warm.py, torchrun's ranks too: what torchrun itself does is tested with torchrun.
    """
    program, *args = command.split() if isinstance(command, str) else command
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if program == "torchrun":
        (size,) = (int(arg.partition("=")[2]) for arg in args if arg.startswith("--nproc_per_node="))
        args = [arg for arg in args if not arg.startswith("--nproc_per_node=")]
        with tempfile.TemporaryDirectory() as place:
            done, printed, said = warm.Torchrun(args, size, ROOT, env, Path(place)).finish(TIMEOUT_S)
    else:
        one = warm.run(args, ROOT, TIMEOUT_S, env)
        done, printed, said = one.returncode, one.stdout, one.stderr
    assert not done, said[-2000:]
    expect(printed, shown)


def expect(printed: str, shown: str) -> None:
    """The shown lines are printed in this order."""
    lines, at = printed.splitlines(), 0
    for line in shown.split("\n"):
        alike = re.compile(_any_numbers(line[1:]) if line.startswith(MEASURED) else re.escape(line))
        found = [i for i in range(at, len(lines)) if alike.match(lines[i])]
        assert found or not line, f"nothing like {line!r} is printed after line {at} of\n{printed}"
        at = found[0] + 1 if line else at


def _any_numbers(line: str) -> str:
    """The line as a regular expression: any number in the place of each, as much space as it needs."""
    words = [r"\s+".join(re.escape(word) for word in re.split(r"\s+", text)) for text in NUMBER.split(line)]
    return NUMBER.pattern.join(words)
