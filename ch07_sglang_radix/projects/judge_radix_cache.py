"""The parts of the project `radix_cache`."""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import transformers

from ch07_sglang_radix.eviction import STRATEGIES
from ch07_sglang_radix.memory_pool import TokenToKVPool
from ch07_sglang_radix.projects.swap import PRODUCT, in_place
from ch07_sglang_radix.radix_cache import RadixCache
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.sampling.params import SamplingParams
from common.teaching.expect import ask, expect
from common.teaching.grading import Found, Part
from common.tiny_qwen import TINY_QWEN_PATH

ROOT = Path(__file__).parents[2]
WANTED = 3.0  # times as long as the reference, at most
ROUNDS = 3  # of the measurement; the best counts
ONE_TEST, ALL_TESTS = 60, 180  # seconds

Requests = list[tuple[list[int], int]]  # (prompt, tokens to put out)


def product_tests(file: str):
    """A part: the product's own tests of `file` with the reader's class; each test has its share.

    They run in a process of their own, which a test that takes longer than ONE_TEST ends.
    """

    def judge(m: ModuleType) -> Found:
        if not (ROOT / file).is_file():
            raise AssertionError(f"{file}: got no such file, wanted the repository's own tests beside the chapters")
        with tempfile.TemporaryDirectory() as folder:
            results = Path(folder) / "results.jsonl"
            results.touch()
            env = os.environ | {"PROJECT_FILE": m.__file__, "PROJECT_RESULTS": str(results)}
            # nbmake is about notebooks, and takes seconds to import
            argv = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", "-p", "no:nbmake",
                    f"--timeout={ONE_TEST}", "--timeout-method=thread", "-p", "ch07_sglang_radix.projects.swap", file]  # fmt: skip
            with suppress(subprocess.TimeoutExpired):  # what was found by then counts
                subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, timeout=ALL_TESTS, check=False)
            rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
        collected = next((row["collected"] for row in rows if "collected" in row), 0)
        passed = [row for row in rows if row.get("passed")]
        if len(passed) == collected > 0:
            return f"{collected} of {collected} pass"
        wrong = [f"{row['test']}: {row['said']}" for row in rows if row.get("passed") is False]
        begun = {row["begun"]: None for row in rows if "begun" in row}
        ended = [f"{test}: still busy after {ONE_TEST} seconds, or it ended the process" for test in begun
                 if all(row.get("test") != test for row in rows)]  # fmt: skip
        return len(passed) / max(
            collected, 1
        ), f"{len(passed)} of {collected} pass; {(wrong + ended + ['none was begun'])[0]}"

    return judge


# --- the tree alone, beside the product's


def against_the_reference(m: ModuleType) -> Found:
    rng, operations = random.Random(0), 0
    for strategy in STRATEGIES:
        for page_size in (1, 4):
            trees = [
                kind(TokenToKVPool(num_pages=60, page_size=page_size), eviction=strategy)
                for kind in (PRODUCT, m.RadixCache)
            ]
            locked: list[list] = []
            for number in range(250):
                what = f"eviction {strategy}, pages of {page_size}, operation {number}"
                _same_operation(rng, trees, locked, what)
                operations += 1
                for name in ("evictable_size", "protected_size", "inserted", "evicted", "splits"):
                    expect(f"{what}: {name}", getattr(trees[1], name), getattr(trees[0], name))
                expect(f"{what}: the tree", _lines(trees[1]), _lines(trees[0]))
                expect(f"{what}: free pages", sorted(trees[1].pool.free_pages()), sorted(trees[0].pool.free_pages()))
    return f"{operations} operations, {len(STRATEGIES)} strategies: the same tree at every moment"


def _lines(tree: RadixCache) -> list[str]:
    return sorted(
        f"{node.key.tolist()} -> {node.value.tolist()}, hits {node.hit_count}, priority {node.priority}, lock_ref {node.lock_ref}, "
        f"{len(node.children)} children"
        for node in tree.nodes()
    )


def _same_operation(rng: random.Random, trees: list[RadixCache], locked: list[list], what: str) -> None:
    size, dice = trees[0].page_size, rng.random()
    ids = [rng.randrange(3) for _ in range(rng.randint(0, 8 * size))]
    extra, priority, done = rng.choice((None, None, "salt")), rng.randrange(3), []
    if dice < 0.45 and trees[0].pool.num_free_pages >= len(ids) // size:
        inserted_len = rng.choice((0, 0, len(ids)))
        for tree in trees:
            slots = tree.pool.alloc(len(ids) // size)
            known = ask(tree.insert, ids, slots, extra, priority, inserted_len)
            tree.pool.free(slots[:known])
            done.append(known)
        expect(f"{what}: insert({ids}, extra_key={extra!r}) says how much was there", done[1], done[0])
    elif dice < 0.7:
        for tree in trees:
            done.append(ask(tree.match_prefix, ids, extra))
        expect(f"{what}: slots of match_prefix({ids}, {extra!r})", done[1].slots, done[0].slots)
        expect(f"{what}: tokens of the node it ends at", done[1].last_node.key, done[0].last_node.key)
        if dice < 0.55:
            for tree, match in zip(trees, done, strict=True):
                ask(tree.inc_lock_ref, match.last_node)
            locked.append([match.last_node for match in done])
    elif dice < 0.8 and locked:
        for tree, node in zip(trees, locked.pop(rng.randrange(len(locked))), strict=True):
            ask(tree.dec_lock_ref, node)
    else:
        count = rng.randint(1, 6 * size)
        for tree in trees:
            done.append(ask(tree.evict, count))
        expect(f"{what}: evict({count})", done[1], done[0])


# --- in the engine


@cache
def _model() -> torch.nn.Module:
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(TINY_QWEN_PATH, dtype=torch.float32).eval()


def transformers_tokens(prompt: list[int], count: int) -> list[int]:
    """Its greedy answer to this prompt alone."""
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    out = _model().generate(
        ids, attention_mask=mask, max_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


def _requests(seed: int, count: int = 10) -> Requests:
    """Most begin alike, some are asked twice."""
    rng = random.Random(seed)
    heads = [[rng.randrange(300, 3000) for _ in range(24)] for _ in range(2)]
    some = [
        (rng.choice(heads) + [rng.randrange(300, 3000) for _ in range(rng.randint(1, 16))], rng.randint(2, 12))
        for _ in range(count)
    ]
    return some + some[:3]


def _answers(
    tree_class: type, requests: Requests, *, pool: int = 1024, page_size: int = 4, **options
) -> tuple[list[list[int]], int]:
    """The tokens, and how many prompt tokens came from the tree. Every page is counted after every step."""
    with in_place(tree_class):
        wrapper = TPRadixAttentionModelWrapper(None, "cpu", page_size, max_total_tokens=pool, max_running_requests=6)
        engine = TPScheduler(wrapper, check=True, **options)
        ids = []
        for prompt, count in requests:
            params = SamplingParams(max_new_tokens=count, ignore_eos=True)
            ids.append(engine.add_request(input_ids=prompt, sampling_params=params))
        results = engine.process_requests()
        assert isinstance(engine.tree, tree_class), (
            f"got a {type(engine.tree).__name__} in the engine, wanted the file's RadixCache"
        )
        return [results[i].output_ids for i in ids], engine.served["cached"]


def in_the_engine(seed: int, **options):
    def judge(m: ModuleType) -> Found:
        requests = _requests(seed)
        got, _ = _answers(m.RadixCache, requests, **options)
        for i, (prompt, count) in enumerate(requests):
            expect(
                f"tokens of request {i} of {len(requests)}, as transformers'",
                got[i],
                transformers_tokens(prompt, count),
            )
        return f"{len(got)} answers, token for token transformers', no page lost"

    return judge


def hits(m: ModuleType) -> Found:
    """Tokens found, for a large and a small pool and several strategies: numbers that no machine changes."""
    said = []
    for options in (
        {"pool": 4096},
        {"pool": 144},
        {"pool": 144, "radix_eviction_policy": "lfu"},
        {"pool": 160, "page_size": 1},
    ):
        requests = _requests(7, 24) + _requests(8, 12)
        (_, want), (_, got) = (
            _answers(kind, requests, schedule_policy="lpm", **options) for kind in (PRODUCT, m.RadixCache)
        )
        expect(f"prompt tokens found in the tree with {options}", got, want)
        said.append(str(got))
    return f"as many prompt tokens as the reference finds: {', '.join(said)}"


def speed(m: ModuleType) -> Found:
    """Operations a second against the reference's, in turn in one process: a full pool of 3,000 leaves, prompts that branch."""
    best, per_second = 0.0, 0.0
    for number in range(ROUNDS):
        rng = random.Random(number)
        heads = [[rng.randrange(50_000) for _ in range(160)] for _ in range(20)]
        prompts = [
            rng.choice(heads)[: 16 * rng.randint(2, 10)] + [rng.randrange(50_000) for _ in range(48)]
            for _ in range(500)
        ]
        trees = [kind(TokenToKVPool(num_pages=3000, page_size=16)) for kind in (PRODUCT, m.RadixCache)]
        for tree in trees:
            for i in range(3000):
                tree.insert([50_000 + i] * 16, tree.pool.alloc(1))
        seconds = [0.0, 0.0]
        for first in range(0, len(prompts), 50):
            for i, tree in enumerate(trees):
                began = time.perf_counter()
                for prompt in prompts[first : first + 50]:
                    _serve(tree, prompt)
                seconds[i] += time.perf_counter() - began
        if seconds[0] / seconds[1] > best:
            best, per_second = seconds[0] / seconds[1], 5 * len(prompts) / seconds[1]
        if not 0.1 < best < 1:  # no noise would change that
            break
    said = f"{per_second:,.0f} operations/s, {1 / best:.1f} times the reference's time; at most {WANTED:g} wanted"
    return (1.0 if best * WANTED >= 1 else 0.0), said


def _serve(tree: RadixCache, prompt: list[int]) -> None:
    """Five operations: match, lock, evict what is missing, insert, unlock."""
    match = tree.match_prefix(prompt[:-1])
    tree.inc_lock_ref(match.last_node)
    pages = len(prompt) // 16 - len(match.slots) // 16
    tree.evict(max(1, 16 * (pages - tree.pool.num_free_pages)) if pages > tree.pool.num_free_pages else 0)
    own = tree.pool.alloc(pages)
    known = tree.insert(prompt, np.concatenate([match.slots, own]))
    tree.pool.free(own[: known - len(match.slots)])
    tree.dec_lock_ref(match.last_node)


PARTS = (
    Part("tests/ch07/test_radix_cache.py", 25, product_tests("tests/ch07/test_radix_cache.py"), ALL_TESTS + 30),
    Part("tests/ch07/test_eviction.py", 15, product_tests("tests/ch07/test_eviction.py"), ALL_TESTS + 30),
    Part("beside the product's tree", 15, against_the_reference, 120),
    Part("engine: shared beginnings", 10, in_the_engine(1)),
    Part("engine: a pool that is too small", 10, in_the_engine(2, pool=96)),
    Part("engine: prompts in chunks, lpm, lfu", 10,
         in_the_engine(3, pool=144, chunked_prefill_size=8, schedule_policy="lpm", radix_eviction_policy="lfu")),
    Part("engine: overlap, pages of one token", 5, in_the_engine(4, pool=128, page_size=1, overlap=True)),
    Part("tokens found", 10, hits, 120),
    Part("speed", 0, speed, 120),
)  # fmt: skip
