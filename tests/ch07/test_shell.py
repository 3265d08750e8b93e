"""The shell: what a reader types, and what it says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ch07_sglang_radix import Engine
from ch07_sglang_radix.shell import Shell

ROOT = Path(__file__).parents[2]


@pytest.fixture
def shell():
    lines = []
    with Engine(device="cpu", page_size=1, check=True) as engine:
        made = Shell(engine, lambda *words, end="\n", flush=False: lines.append(" ".join(map(str, words)) + end))
        made.said = lambda: "".join(lines)
        yield made


def test_the_second_turn_finds_the_first_in_the_tree(shell):
    for text in ("What is a radix cache?", "Say that in Chinese."):
        assert shell.line(text)
    first, second = [line for line in shell.said().splitlines() if "came from the tree" in line]
    assert first.strip().startswith("0 of ")
    cached, prompt = map(int, second.replace("of", "").split()[:2])
    assert cached > prompt / 2
    assert [turn["role"] for turn in shell.turns] == ["user", "assistant"] * 2
    assert "前缀缓存" in shell.turns[-1]["content"]


def test_commands(shell):
    shell.line("What is a page?")
    for line in ("/tree", "/stats", "/flush", "/stats", "/new", "/chat off", "/help", ""):
        assert shell.line(line)
    assert "What is a" in shell.said(), "the tree in words"
    assert shell.turns == []
    assert not shell.chat
    assert shell.engine.get_server_info()["evictable_tokens"] == 0
    assert not shell.line("/quit")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/set temperature -3", "temperature=-3 must be in"), ("/set temperature warm", "'warm' is no number"),
        ("/set colour 3", "unknown sampling parameter colour"), ("/what", "/quit"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_and_changes_nothing(shell, line, says):
    before = dict(shell.params)
    assert shell.line(line)
    assert says in shell.said()
    assert shell.params == before


def test_it_reads_a_pipe_to_its_end():
    done = subprocess.run(
        [sys.executable, "-m", "ch07_sglang_radix.shell", "--device", "cpu"], input="What is a rank?\n", text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}, capture_output=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-1000:]
    assert "prompt tokens came from the tree" in done.stdout
