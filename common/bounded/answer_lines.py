"""The life of a bounded process (process.py). Imports nothing that takes time."""

import json
import signal
import sys
from collections.abc import Callable
from typing import Any


def answer_lines(answer: Callable[..., dict[str, Any]]) -> None:
    """A line of JSON in, answer(**what it holds) as a line of JSON out, until nobody writes any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the engine, which ends this process with itself
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    answers.write(b"{}\n")  # ready
    answers.flush()
    for line in sys.stdin.buffer:
        answers.write(json.dumps(answer(**json.loads(line))).encode() + b"\n")
        answers.flush()
