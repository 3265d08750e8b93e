"""An evicted prefix comes back: from the host's memory, from a disk, and not from a page that is damaged.

    python ch07_sglang_radix/quantization/demo_6_comes_back.py [--ranks 2]

The pool of the device holds one of two long prompts. Each of them is asked in turn, and each answer is that of an engine which has
room for everything; what changes is where the prompt's K and V are found. Then the engine ends, and the next one finds the files.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ch07_sglang_radix import Engine
from common.distributed.launch import run_main
from common.storage.page_keys import chain, first_key
from common.storage.page_store import HEAD
from common.teaching.show import check, heading, mistake, table

PAGE = 16
FACTS = (
    "A radix cache is a tree. A page holds tokens. A leaf may be evicted. The host has more memory than the device. "
)
PROMPTS = {"A": "First. " + 3 * FACTS + "What is a radix cache?", "B": "Second. " + 3 * FACTS + "What is a page?"}
PARAMS = {"max_new_tokens": 16, "temperature": 0.0}
Row = tuple[str, str, int, int, int, int, int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=1, help="tensor-parallel ranks")
    ranks = parser.parse_args().ranks
    names()
    with Engine(device="cpu", page_size=PAGE, tp_size=ranks) as engine:
        want = {name: engine.generate(text, PARAMS)["text"] for name, text in PROMPTS.items()}
        tokens = max(engine.generate(text, PARAMS)["meta_info"]["prompt_tokens"] for text in PROMPTS.values())
    room = -(-(tokens + PARAMS["max_new_tokens"]) // PAGE) * PAGE
    with tempfile.TemporaryDirectory() as folder:
        tiers(folder, ranks, room, want)


def names() -> None:
    heading("A page is named by all tokens up to its end")
    one, other = np.array([[1, 2], [3, 4]]), np.array([[9, 2], [3, 4]])
    rows = []
    for pages in (one, other):
        for page, key in zip(pages.tolist(), chain(first_key("base"), pages), strict=True):
            rows.append((str(pages.tolist()), str(page), key.hex()[:16]))
    table(("prompt in pages", "page", "h"), rows)
    alone = [chain(first_key("base"), pages[1:])[0].hex()[:16] for pages in (one, other)]
    chained = [chain(first_key("base"), pages)[1].hex()[:16] for pages in (one, other)]
    mistake("the second pages named by their own tokens", " ".join(alone), " ".join(chained))
    check("the same tokens behind another beginning are another page", chained[0] != chained[1])


def tiers(folder: str, ranks: int, room: int, want: dict[str, str]) -> None:
    options = {
        "device": "cpu", "tp_size": ranks, "page_size": PAGE, "max_total_tokens": room, "enable_hierarchical_cache": True,
        "hicache_ratio": 3, "hicache_storage_backend": "file", "hicache_storage_dir": folder, "hicache_prefetch_threshold": PAGE,
        "hicache_storage_prefetch_policy": "wait_complete", "check": True,
    }  # fmt: skip
    heading(f"Two prompts, and {room} tokens of room on the device")
    answers, rows = [], []
    with Engine(**options) as engine:
        for when, name in (("new", "A"), ("again", "A"), ("new", "B"), ("evicted by B", "A")):
            rows.append(ask(engine, when, name, answers))
        at_rest(engine)
        engine.flush_cache()
        rows.append(ask(engine, "device and host flushed", "A", answers))
        page_bytes = engine.scheduler.tiers.controller.pool.page_bytes
    with Engine(**options) as engine:
        rows.append(ask(engine, "another engine", "B", answers))
    last = damage(folder)
    with Engine(**options) as engine:
        rows.append(ask(engine, "a bit of each file turned", "A", answers))
        damaged = engine.get_server_info()["storage_damaged_pages"]
        at_rest(engine)
    with Engine(**options) as engine:
        rows.append(ask(engine, "written anew", "A", answers))
    table(("", "prompt", "tokens", "device", "host", "disk", "computed"), rows)
    check(
        "every answer is that of an engine with room for everything", all(text == want[name] for name, text in answers)
    )
    check("what was evicted came from the host", rows[3][4] > 0 and rows[3][6] < PAGE + 1)
    check(
        "what was flushed, and what another engine has computed, came from the disk", rows[4][5] > 0 and rows[5][5] > 0
    )
    check(f"no damaged page was used ({damaged} found, and removed)", rows[6][5] == 0 and damaged > 0)
    check("and their tokens were computed, and written again", rows[7][5] > 0)
    heading("A file")
    magic, version, key, length, payload = HEAD.unpack(last[: HEAD.size])
    form = last[HEAD.size : HEAD.size + length].decode()
    table(
        ("what", "bytes", ""),
        [
            ("magic, version", 8, f"{magic.decode()} {version}"), ("key", 32, key.hex()[:16] + "..."),
            ("lengths", 12, f"{length} {payload}"), ("form", length, form), ("payload", payload, "K and V of this rank's heads"),
            ("SHA-256", 32, last[-32:].hex()[:16] + "..."),
        ],
    )  # fmt: skip
    check("a page's bytes, and nothing else", payload == page_bytes and len(last) == HEAD.size + length + payload + 32)


def ask(engine: Engine, when: str, name: str, answers: list[tuple[str, str]]) -> Row:
    answer = engine.generate(PROMPTS[name], PARAMS)
    answers.append((name, answer["text"]))
    meta = answer["meta_info"]
    below = meta.get("cached_tokens_details") or {"device": meta["cached_tokens"], "host": 0, "storage": 0}
    computed = meta["prompt_tokens"] - meta["cached_tokens"]
    return when, name, meta["prompt_tokens"], below["device"], below["host"], below["storage"], computed


def at_rest(engine: Engine) -> None:
    """All files are written."""
    while engine.scheduler.tiers.controller.storage.backlog:
        pass


def damage(folder: str) -> bytes:
    """Turn a bit in the middle of every file; returns what one of them was before."""
    before = b""
    for path in files(folder):
        before = path.read_bytes()
        data = bytearray(before)
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    return before


def files(folder: str) -> Iterator[Path]:
    yield from sorted(Path(folder).glob("*.kv"))


if __name__ == "__main__":
    run_main(main)
