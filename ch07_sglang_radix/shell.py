"""Ask, and watch the tree: a small shell around the engine.

    python -m ch07_sglang_radix.shell                     # the bundled model; or make shell
    python -m ch07_sglang_radix.shell --tp-size 2         # starts the other rank itself
    python -m ch07_sglang_radix.shell --model-path FOLDER_OR_HUB_ID

What you type is a turn of one conversation: from the second on its beginning comes from the radix tree. Lines that begin with
a slash are commands (/help lists them). Ctrl-C ends an answer, Ctrl-D the shell.
"""

import argparse
import sys
from collections.abc import Callable

import numpy as np

from ch07_sglang_radix.engine import Engine
from common.distributed.launch import run_main

SHOWN_NODES, SHOWN_WORDS = 24, 60
HELP = """  /tree          the radix tree in words: each line a node, with its KV slots
  /stats         pages, hit rate, steps
  /flush         forget every cached prefix
  /chat on|off   talk through the model's chat template, or send the bare text
  /new           begin a new conversation
  /set NAME VALUE   a sampling parameter: temperature, max_new_tokens, top_p, ...
  /quit          leave (or Ctrl-D)"""


class Shell:
    """One conversation with an engine. `say` prints."""

    def __init__(self, engine: Engine, say: Callable[..., None] = print):
        self.engine, self.say = engine, say
        self.tokenizer = engine.wrapper.tokenizer
        self.chat = self.tokenizer.has_chat_template
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
        except ValueError as error:
            self.say(f"  {error}")
        return True

    def command(self, name: str, rest: list[str]) -> None:
        if name == "tree":
            self.show_tree()
        elif name == "stats":
            self.show_stats()
        elif name == "flush":
            self.say("  forgotten" if self.engine.flush_cache() else "  something still runs")
        elif name == "new":
            self.turns = []
        elif name == "chat" and rest in (["on"], ["off"]):
            if rest == ["on"] and not self.tokenizer.has_chat_template:
                raise ValueError("this checkpoint has no chat template; plain text it is")
            self.chat, self.turns = rest == ["on"], []
        elif name == "set" and len(rest) == 2:
            self.set(*rest)
        else:
            self.say(HELP)

    def set(self, name: str, value: str) -> None:
        try:
            number = float(value) if "." in value else int(value)
        except ValueError:
            raise ValueError(f"{value!r} is no number") from None
        params = self.params | {name: number}
        self.engine.generate(input_ids=[0], sampling_params=params | {"max_new_tokens": 1})  # refused here, not later
        self.params = params

    def ask(self, text: str) -> None:
        """Stream the answer, then say where its prompt came from."""
        asked = [*self.turns, {"role": "user", "content": text}]
        ids = self.tokenizer.encode_chat(asked) if self.chat else self.tokenizer.encode(text)
        shown, last = "", None
        stream = self.engine.generate(input_ids=ids, sampling_params=self.params, stream=True)
        try:
            for last in stream:
                self.say(last["text"][len(shown) :], end="", flush=True)
                shown = last["text"]
        except KeyboardInterrupt:
            stream.close()
            self.say("  (ended)", end="")
        self.say()
        if last is None:
            return
        if self.chat:
            self.turns = [*asked, {"role": "assistant", "content": shown}]
        meta = last["meta_info"]
        self.say(f"  {meta['cached_tokens']} of {meta['prompt_tokens']} prompt tokens came from the tree")

    def show_tree(self) -> None:
        lines = self.engine.scheduler.tree.pretty(self.words).splitlines()
        self.say("\n".join(f"  {line}" for line in lines[:SHOWN_NODES]))
        if len(lines) > SHOWN_NODES:
            self.say(f"  ... and {len(lines) - SHOWN_NODES} nodes more")

    def words(self, key: np.ndarray) -> str:
        text = repr(self.tokenizer.decode(key.tolist(), skip_special_tokens=False))
        return text if len(text) <= SHOWN_WORDS else f"{text[: SHOWN_WORDS // 2]} ... {text[-SHOWN_WORDS // 2 :]}"

    def show_stats(self) -> None:
        info = self.engine.get_server_info()
        for name in (
            "max_total_num_tokens",
            "free_tokens",
            "evictable_tokens",
            "hit_rate",
            "prompt_tokens",
            "cached_tokens",
        ):
            value = info[name]
            self.say(f"  {name:22s} {value:,.3f}" if isinstance(value, float) else f"  {name:22s} {value:,}")
        self.say(f"  {'steps':22s} {info['steps']['prefill']} prefill, {info['steps']['decode']} decode")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", help="a folder or a Hub id; default: the bundled model")
    parser.add_argument("--tp-size", type=int, default=1, help="ranks; they are started by this command")
    parser.add_argument("--page-size", type=int, default=1, help="tokens a page; 1 shares every token")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    args = parser.parse_args()
    with Engine(args.model_path, tp_size=args.tp_size, page_size=args.page_size, device=args.device) as engine:
        if engine.wrapper.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer, and a shell speaks in words")
        shell = Shell(engine)
        print(
            f"{engine.get_server_info()['model']['architecture']} on {args.tp_size} rank(s). /help lists the commands."
        )
        while True:
            try:
                if not shell.line(input("> ")):
                    break
            except EOFError:
                print()
                break
            except KeyboardInterrupt:
                print("  (/quit leaves)")
        sys.stdout.flush()


if __name__ == "__main__":
    run_main(main)
