"""The chat: what a reader types, and what it says; with an engine in the process, and with a server."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ch07_sglang_radix import Engine
from ch07_sglang_radix.chat import Chat, InProcess, OverHttp
from common.tiny_qwen import ADAPTERS_PATH
from tests.ch07.serving.fake_openai import FakeServer

ROOT = Path(__file__).parents[2]


def recorded(model):
    """A Chat, and in `said()` all that it has printed."""
    lines = []
    made = Chat(model, lambda *words, end="\n", flush=False: lines.append(" ".join(map(str, words)) + end))
    made.said = lambda: "".join(lines)
    return made


@pytest.fixture
def chat():
    with Engine(device="cpu", page_size=1, check=True) as engine:
        yield recorded(InProcess(engine))


def test_the_second_turn_finds_the_first_in_the_tree(chat):
    for text in ("What is a radix cache?", "Say that in Chinese."):
        assert chat.line(text)
    first, second = [line for line in chat.said().splitlines() if "came from the tree" in line]
    assert first.strip().startswith("0 of ")
    cached, prompt = map(int, second.replace("of", "").split()[:2])
    assert cached > prompt / 2
    assert [turn["role"] for turn in chat.turns] == ["user", "assistant"] * 2
    assert "前缀缓存" in chat.turns[-1]["content"]
    assert re.search(r"tree; first token after [\d,]+ ms, then [\d,]+ tokens/s$", chat.said().strip())


def test_another_adapter_answers_and_shares_no_page_with_the_base():
    paths = {name: str(ADAPTERS_PATH / name) for name in ("pirate", "terse")}
    with Engine(device="cpu", lora_paths=paths, check=True) as engine:
        chat = recorded(InProcess(engine))
        for line in ("What is a page?", "/new", "/adapter pirate", "What is a page?", "/adapter nobody", "/new"):
            chat.line(line)
        assert chat.model.adapter == "pirate"
        chat.line("/adapter off")
        chat.line("What is a page?")
    said = chat.said()
    assert said.count("Ahoy!") == 1
    assert "lora_path='nobody' is not loaded; loaded: pirate, terse" in said
    first, _, again = [line.strip() for line in said.splitlines() if "came from the tree" in line]
    assert first.startswith("0 of ")
    assert not again.startswith("0 of ")


def test_commands(chat):
    chat.line("What is a page?")
    for line in ("/tree", "/stats", "/flush", "/stats", "/new", "/chat off", "/help", ""):
        assert chat.line(line)
    assert "What is a" in chat.said(), "the tree in words"
    assert chat.turns == []
    assert not chat.templated
    assert chat.model.stats()["evictable_tokens"] == 0
    assert not chat.line("/quit")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/set temperature -3", "temperature=-3 must be in"), ("/set temperature warm", "'warm' is no number"),
        ("/set colour 3", "unknown sampling parameter colour"), ("/what", "  /what is no command; these are:\n  /tree"),
        ("/set stop tree", "'tree' is no number; /set takes no other values"), ("/chat", "/chat takes other words; these are:"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_and_changes_nothing(chat, line, says):
    before = dict(chat.params)
    assert chat.line(line)
    assert says in chat.said()
    assert chat.params == before


def test_what_a_command_has_changed_is_said(chat):
    for line, says in (
        ("/set max_new_tokens 3", "  max_new_tokens=3"), ("/set top_p 0.5", "  max_new_tokens=3, top_p=0.5"),
        ("/new", "  a new conversation"), ("What is a page?", "came from the tree"),
        ("/new", "  a new conversation; 1 question(s) and their answers are no part of it"), ("What is a page?", "tree"),
        ("/chat off", "  the bare text, and no turn knows those before it; a new conversation; 1 question(s)"),
        ("/chat on", "  through the chat template; a new conversation"),
    ):  # fmt: skip
        chat.line(line)
        assert says in chat.said().splitlines()[-1], line
    chat.line("/help")
    assert "is no command" not in chat.said()


def test_it_reads_a_pipe_to_its_end():
    done = subprocess.run(
        [sys.executable, "-m", "ch07_sglang_radix.chat", "--device", "cpu"], input="What is a rank?\n", text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}, capture_output=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-1000:]
    assert "prompt tokens came from the tree" in done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT to one process")
def test_ctrl_c_ends_an_answer_and_not_the_chat():
    done = subprocess.Popen(
        [sys.executable, "-u", "-m", "ch07_sglang_radix.chat", "--device", "cpu"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    with done:
        done.stdin.write("/set max_new_tokens 1500\n/set min_new_tokens 1500\nWhat is a rank?\n")
        done.stdin.flush()
        seen = ""
        while not re.search(r"(> .*){3}\w", seen, re.DOTALL):  # behind the third prompt: the answer has begun
            seen += done.stdout.read(1)
        done.send_signal(signal.SIGINT)
        out, err = done.communicate("/new\n/set min_new_tokens 0\nWhat is a page?\n/quit\n", timeout=200)
    assert done.returncode == 0, err[-1000:]
    assert out.count("(ended)") == 1
    assert out.count("came from the tree") == 2


# --- with a server


class Serving(threading.Thread):
    """A fake server in a thread of its own; its settings may be changed while it runs."""

    def __init__(self, **settings):
        super().__init__(daemon=True)
        self.server, self._ready, self._loop = FakeServer(**settings), threading.Event(), asyncio.new_event_loop()

    def run(self):
        self._loop.run_until_complete(self.server.__aenter__())
        self._ready.set()
        self._loop.run_forever()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))

    def __enter__(self):
        self.start()
        self._ready.wait(100)
        return self.server

    def __exit__(self, *exc):
        self._loop.call_soon_threadsafe(self._loop.stop)
        self.join(100)


def test_a_server_is_asked_as_a_chat_with_all_turns():
    with Serving(cached=2) as server:
        chat = recorded(OverHttp(server.url, None))
        chat.line("/set max_new_tokens 3")
        for text in ("How are you?", "And now?"):
            assert chat.line(text)
        assert chat.said().count(" one two three\n  2 of ") == 2
        assert "first token after" in chat.said()
        path, body = server.asked[-1]
        assert path == "/v1/chat/completions"
        assert [m["role"] for m in body["messages"]] == ["user", "assistant", "user"]
        assert (body["model"], body["max_tokens"]) == ("fake", 3)
        chat.line("/chat off")
        chat.line("/set temperature 0.5")
        chat.line("Once upon a time")
        path, body = server.asked[-1]
        assert (path, body["prompt"], body["temperature"]) == ("/v1/completions", "Once upon a time", 0.5)


def test_a_server_that_tells_less_and_refuses_is_answered_for_in_one_line():
    with Serving() as server:
        chat = recorded(OverHttp(server.url, None))
        chat.line("Hello")
        assert "the server does not tell what came from its cache; first token" in chat.said()
        for command, says in (("/tree", "draws it at /xray"), ("/stats", "no /server_info"), ("/flush", "answers 404")):
            chat.line(command)
            assert says in chat.said().splitlines()[-1]
        server.refuse = (400, {"error": {"message": "top_p must be in (0, 1]"}})
        before = dict(chat.params)
        chat.line("/set top_p 7")
        assert chat.said().splitlines()[-1] == "  400: top_p must be in (0, 1]"
        assert chat.params == before
        with pytest.raises(ValueError, match="answers 400"):
            OverHttp(server.url, None)
    with pytest.raises(OSError, match="onnect"):
        OverHttp("http://127.0.0.1:9", None)
