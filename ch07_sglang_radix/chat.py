"""Talk to a model, and see after each answer how much of its prompt came from the radix tree, and how fast it was.

    python -m ch07_sglang_radix.chat                     # an engine in this process, the bundled model; or make chat
    python -m ch07_sglang_radix.chat --tp-size 2         # starts the other rank itself
    python -m ch07_sglang_radix.chat --model-path FOLDER_OR_HUB_ID
    python -m ch07_sglang_radix.chat --lora-paths pirate=common/tiny_qwen/adapters/pirate     # then /adapter pirate
    python -m ch07_sglang_radix.chat --server http://127.0.0.1:30000     # or any server that speaks OpenAI's API

What you type is a turn of one conversation: from the second on its beginning comes from the radix tree. Lines that begin with
a slash are commands (/help lists them). Ctrl-C ends an answer, Ctrl-D the conversation.
"""

import argparse
import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import aclosing, suppress
from typing import Any

import numpy as np

from ch07_sglang_radix.engine import Engine
from ch07_sglang_radix.serving.ask import CHAT, COMPLETIONS, Answer, stream
from ch07_sglang_radix.serving.http_client import Client, ServerError
from common.distributed.launch import run_main
from common.vision.keys import readable

SHOWN_NODES, SHOWN_WORDS = 24, 60
COMMANDS = ("tree", "stats", "flush", "chat", "new", "set", "adapter")
HELP = """  /tree          the radix tree in words: each line a node, with its KV slots
  /stats         pages, hit rate, steps
  /flush         forget every cached prefix
  /chat on|off   talk through the model's chat template, or send the bare text
  /new           begin a new conversation
  /set NAME VALUE   a sampling parameter: temperature, max_new_tokens, top_p, ...
  /adapter NAME  answer with this LoRA adapter; off: with the base model
  /quit          leave (or Ctrl-D)"""
STATS = ("max_total_num_tokens", "free_tokens", "evictable_tokens", "hit_rate", "prompt_tokens", "cached_tokens")
Said = str | list[dict[str, str]]  # a bare text, or the messages of a conversation


class InProcess:
    """Who answers: an engine here. adapter: with which of its adapters."""

    adapter: str | None = None

    def __init__(self, engine: Engine):
        if engine.wrapper.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer, and a chat speaks in words")
        self.engine, self.tokenizer = engine, engine.wrapper.tokenizer
        self.has_chat_template = self.tokenizer.has_chat_template
        self.name = engine.get_server_info()["model"]["architecture"]

    def ask(self, said: Said, params: dict[str, Any], answer: Answer, grown: Callable[[], None]) -> None:
        """Fill `answer`, and call `grown` each time it has grown."""
        ids = self.tokenizer.encode(said) if isinstance(said, str) else self.tokenizer.encode_chat(said)
        chunks = self.engine.generate(input_ids=ids, sampling_params=params, stream=True, lora_path=self.adapter)
        try:
            for chunk in chunks:
                meta = chunk["meta_info"]
                answer.text, answer.prompt_tokens = chunk["text"], meta["prompt_tokens"]
                answer.completion_tokens, answer.cached_tokens = meta["completion_tokens"], meta["cached_tokens"]
                grown()
        finally:
            chunks.close()

    def stats(self) -> dict[str, Any]:
        return self.engine.get_server_info()

    def flush(self) -> bool:
        return self.engine.flush_cache()

    def tree(self) -> list[str]:
        """A line a node."""
        return self.engine.scheduler.tree.pretty(self._words).splitlines()

    def _words(self, key: np.ndarray) -> str:
        if vision := self.engine.wrapper.config.vision:
            key = readable(key, vision.image_token_id)
        text = repr(self.tokenizer.decode(key.tolist(), skip_special_tokens=False))
        return text if len(text) <= SHOWN_WORDS else f"{text[: SHOWN_WORDS // 2]} ... {text[-SHOWN_WORDS // 2 :]}"


class OverHttp:
    """Who answers: a server. Raises OSError or ServerError if there is none."""

    has_chat_template = True  # or the server says so
    adapter: str | None = None

    def __init__(self, url: str, api_key: str | None):
        self.url, self.api_key = url, api_key
        status, models = self._call("GET", "/v1/models")
        if status != 200:
            raise ValueError(
                f"GET {url}/v1/models answers {status}; is this an OpenAI-compatible server, and the key right?"
            )
        self.name = models["data"][0]["id"]

    def ask(self, said: Said, params: dict[str, Any], answer: Answer, grown: Callable[[], None]) -> None:
        others = {name: value for name, value in params.items() if name != "max_new_tokens"}

        async def listen() -> None:
            dialect = COMPLETIONS if isinstance(said, str) else CHAT
            model = f"{self.name}:{self.adapter}" if self.adapter else self.name
            body = dialect.body(model, said, params["max_new_tokens"]) | others
            async with Client(self.url, self.api_key) as client, aclosing(stream(client, dialect, body, answer)) as new:
                async for _ in new:
                    grown()

        asyncio.run(listen())  # Ctrl-C leaves it, which closes the connection, which tells the server

    def stats(self) -> dict[str, Any]:
        status, info = self._call("GET", "/server_info")
        if status != 200:
            raise ValueError(f"this server has no /server_info: it answers {status}")
        return info

    def flush(self) -> bool:
        status, _ = self._call("POST", "/flush_cache")
        if status not in (200, 400):
            raise ValueError(f"this server does not flush its cache: it answers {status}")
        return status == 200

    def tree(self) -> list[str]:
        raise ValueError("the tree is in the server's process; a server of this chapter draws it at /xray")

    def _call(self, method: str, path: str) -> tuple[int, Any]:
        async def call() -> tuple[int, Any]:
            async with Client(self.url, self.api_key) as client:
                return await client.call(method, path)

        return asyncio.run(call())


class Chat:
    """One conversation. `say` prints."""

    def __init__(self, model: InProcess | OverHttp, say: Callable[..., None] = print):
        self.model, self.say = model, say
        self.templated = model.has_chat_template
        self.turns: list[dict[str, str]] = []
        self.params: dict[str, float] = {"max_new_tokens": 128}

    def line(self, text: str) -> bool:
        """Do what a line asks for; False if it was the last."""
        words = text.split()
        if not words:
            return True
        if words[0] in ("/quit", "/exit"):
            return False
        try:
            if words[0].startswith("/"):
                self.command(words[0][1:], words[1:])
            else:
                self.ask(text)
        except (ValueError, ServerError, OSError) as error:
            self.say(f"  {error}")
        return True

    def command(self, name: str, rest: list[str]) -> None:
        if name == "tree":
            lines = self.model.tree()
            self.say("\n".join(f"  {line}" for line in lines[:SHOWN_NODES]))
            if len(lines) > SHOWN_NODES:
                self.say(f"  ... and {len(lines) - SHOWN_NODES} nodes more")
        elif name == "stats":
            self.show_stats(self.model.stats())
        elif name == "flush":
            self.say("  forgotten" if self.model.flush() else "  something still runs")
        elif name == "new":
            self.say(f"  {self._forget()}")
        elif name == "chat" and rest in (["on"], ["off"]):
            if rest == ["on"] and not self.model.has_chat_template:
                raise ValueError("this checkpoint has no chat template; plain text it is")
            self.templated = rest == ["on"]
            what = "through the chat template" if self.templated else "the bare text, and no turn knows those before it"
            self.say(f"  {what}; {self._forget()}")
        elif name == "set" and len(rest) == 2:
            self.set(*rest)
        elif name == "adapter" and len(rest) == 1:
            self.use_adapter(None if rest == ["off"] else rest[0])
        else:
            known = name in COMMANDS
            if name != "help":
                self.say(f"  /{name} {'takes other words' if known else 'is no command'}; these are:")
            self.say(HELP)

    def _forget(self) -> str:
        """Begin a new conversation; says what that leaves behind. The tree keeps what it has."""
        turns, self.turns = len(self.turns) // 2, []
        return (
            f"a new conversation; {turns} question(s) and their answers are no part of it"
            if turns
            else "a new conversation"
        )

    def set(self, name: str, value: str) -> None:
        try:
            number = float(value) if "." in value else int(value)
        except ValueError:
            raise ValueError(f"{value!r} is no number; /set takes no other values") from None
        params = self.params | {name: number}
        with suppress(_EnoughError):  # what is refused is refused now and not later
            self.model.ask(self._said("hello"), params, Answer(), _enough)
        self.params = params
        self.say(f"  {', '.join(f'{name}={value}' for name, value in params.items())}")

    def use_adapter(self, name: str | None) -> None:
        before, self.model.adapter = self.model.adapter, name
        try:
            with suppress(_EnoughError):
                self.model.ask(self._said("hello"), self.params, Answer(), _enough)
        except (ValueError, ServerError):
            self.model.adapter = before
            raise
        self.say(f"  {name or 'the base model'} answers from now on, and finds no page of another adapter in the tree")

    def _said(self, text: str) -> Said:
        return [*self.turns, {"role": "user", "content": text}] if self.templated else text

    def ask(self, text: str) -> None:
        """Stream the answer, then say where its prompt came from and how long it took."""
        said, answer, shown, times = self._said(text), Answer(), 0, [time.perf_counter()]

        def grown() -> None:
            nonlocal shown
            times.append(time.perf_counter())
            self.say(answer.text[shown:], end="", flush=True)
            shown = len(answer.text)

        try:
            self.model.ask(said, self.params, answer, grown)
        except KeyboardInterrupt:
            self.say("  (ended)", end="")
        self.say()
        if len(times) == 1:
            return
        if self.templated:
            self.turns = [*said, {"role": "assistant", "content": answer.text}]
        self.say(f"  {_from_the_tree(answer)}; {_speed(answer, times)}")

    def show_stats(self, info: dict[str, Any]) -> None:
        for name in STATS:
            if (value := info.get(name)) is not None:
                self.say(f"  {name:22s} {value:,.3f}" if isinstance(value, float) else f"  {name:22s} {value:,}")
        if steps := info.get("steps"):
            self.say(f"  {'steps':22s} {steps['prefill']} prefill, {steps['decode']} decode")


class _EnoughError(Exception):
    """The answer has begun, so nothing was refused."""


def _enough() -> None:
    raise _EnoughError


def _from_the_tree(answer: Answer) -> str:
    if answer.cached_tokens is None:
        return "the server does not tell what came from its cache"
    return f"{answer.cached_tokens} of {answer.prompt_tokens} prompt tokens came from the tree"


def _speed(answer: Answer, times: list[float]) -> str:
    """times: when it was asked, and when each part of the answer came."""
    first = f"first token after {1000 * (times[1] - times[0]):,.0f} ms"
    spent = times[-1] - times[1]
    return f"{first}, then {(answer.completion_tokens - 1) / spent:,.0f} tokens/s" if spent else first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", metavar="URL", help="ask a server instead of an engine in this process")
    parser.add_argument(
        "--api-key", default=os.environ.get("OPENAI_API_KEY"), help="default: OPENAI_API_KEY of the environment"
    )
    parser.add_argument("--model-path", help="a folder or a Hub id; default: the bundled model")
    parser.add_argument("--tp-size", type=int, default=1, help="ranks; they are started by this command")
    parser.add_argument("--page-size", type=int, default=1, help="tokens a page; 1 shares every token")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--lora-paths", nargs="*", metavar="NAME=FOLDER", help="LoRA adapters, for /adapter NAME")
    args = parser.parse_args()
    if args.server:
        talk(OverHttp(args.server, args.api_key), args.server)
        return
    options = {name: getattr(args, name) for name in ("tp_size", "page_size", "device", "lora_paths")}
    with Engine(args.model_path, **options) as engine:
        talk(InProcess(engine), f"{args.tp_size} rank(s)")


def talk(model: InProcess | OverHttp, where: str) -> None:
    """Line by line from standard input, to its end or /quit."""
    chat = Chat(model)
    print(f"{model.name} on {where}. /help lists the commands.")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C ends an answer, not the program
    while True:
        try:
            if not chat.line(input("> ")):
                break
        except EOFError:
            print()
            break
        except KeyboardInterrupt:
            print("  (/quit leaves)")
    sys.stdout.flush()


if __name__ == "__main__":
    run_main(main)
