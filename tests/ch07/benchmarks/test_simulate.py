"""The trace simulator against countings that know nothing of the radix tree."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from ch07_sglang_radix.benchmarks import bench_prefix
from ch07_sglang_radix.benchmarks.simulate import BlockCache, simulate
from ch07_sglang_radix.benchmarks.traces import read_trace
from ch07_sglang_radix.benchmarks.workloads import Source, block_trace
from ch07_sglang_radix.eviction import STRATEGIES

ROOT = Path(__file__).parents[3]
LINE = {"timestamp": 5, "input_length": 1000, "output_length": 3, "hash_ids": [1, 2]}


def some_requests(seed, count=150, kinds=3, longest=12):
    """Random keys over few ids: they share, branch, repeat and split in every way."""
    rng = random.Random(seed)
    return [[rng.randrange(kinds) for _ in range(rng.randint(0, longest))] for _ in range(count)]


def conversations(seed, count=150):
    return [line["hash_ids"] for line in block_trace(Source(100, seed), count, blocks=6)]


class PlainLru:
    """The same rules on lists: nodes (path from the root, own blocks, last use); whole leaves go, oldest first."""

    def __init__(self, capacity):
        self.capacity, self.now, self.evicted = capacity, 0, 0
        self.nodes = []  # [start, key, used]: blocks start .. start + own of the prefix `key`

    def blocks(self):
        return sum(len(key) - start for start, key, _ in self.nodes)

    def serve(self, ids):
        self.now += 1
        hits, matched = 0, []
        for found in sorted(self.nodes, key=lambda node: node[0]):  # parents before their children
            node, (start, key, used) = found, found
            if start != hits or key[:start] != ids[:start]:
                continue
            n = start
            while n < min(len(key), len(ids)) and key[n] == ids[n]:
                n += 1
            if n == start:
                continue
            if n < len(key):  # cut it: both halves count as used now, as in SGLang
                node[0], node[2] = n, self.now
                node = [start, key[:n], used]
                self.nodes.append(node)
            node[2] = self.now
            matched.append(node)
            hits = n
        kept = ids[: self.capacity]
        if len(kept) > hits:
            while self.blocks() + len(kept) - hits > self.capacity:
                leaves = [
                    node for node in self.nodes
                    if node not in matched and not any(o[0] == len(node[1]) and o[1][: o[0]] == node[1] for o in self.nodes)
                ]  # fmt: skip
                oldest = min(leaves, key=lambda node: node[2])
                self.evicted += len(oldest[1]) - oldest[0]
                self.nodes.remove(oldest)
            self.now += 1
            for node in matched:
                node[2] = self.now
            self.nodes.append([hits, kept, self.now])
        return hits


@pytest.mark.parametrize("make", [some_requests, conversations])
@pytest.mark.parametrize("eviction", STRATEGIES)
def test_without_a_limit_every_prefix_misses_once(make, eviction):
    requests, known = make(0), set()
    hits = 0
    for ids in requests:
        prefixes = {tuple(ids[: i + 1]) for i in range(len(ids))}
        hits += len(prefixes & known)
        known |= prefixes
    counts = simulate(requests, 0, eviction)
    assert (counts.hit_blocks, counts.prompt_blocks, counts.requests) == (hits, sum(map(len, requests)), len(requests))
    assert counts.hit_rate == hits / counts.prompt_blocks
    assert counts.evicted_blocks == 0


@pytest.mark.parametrize("make", [some_requests, conversations])
@pytest.mark.parametrize("capacity", [1, 4, 17, 60])
@pytest.mark.parametrize("seed", range(4))
def test_lru_is_the_plain_simulation(make, capacity, seed):
    cache, plain = BlockCache(capacity), PlainLru(capacity)
    for ids in make(seed):
        assert cache.serve(ids) == plain.serve(ids)
        assert cache.tree.evictable_size == plain.blocks() <= capacity
        assert cache.tree.evicted == plain.evicted


@pytest.mark.parametrize("eviction", STRATEGIES)
@pytest.mark.parametrize("capacity", [1, 7, 40])
def test_pages_are_conserved(eviction, capacity):
    cache = BlockCache(capacity, eviction)
    for ids in some_requests(1) + conversations(1):
        hits = cache.serve(ids)
        assert cache.pool.num_free_pages + cache.tree.evictable_size == capacity
        assert cache.tree.protected_size == 0
        held = [slot for node in cache.tree.nodes() for slot in node.value.tolist()]
        assert sorted(held + cache.pool.free_pages().tolist()) == list(range(capacity))
        kept = min(len(ids), capacity)
        assert hits <= kept == len(cache.tree.match_prefix(ids).slots)


def test_the_strategies_differ_as_they_should():
    """A loop a little longer than the cache: least recently used never hits, most recently used does."""
    loop = [[i] for i in range(5)] * 10
    assert simulate(loop, 4, "lru").hit_blocks == 0
    assert simulate(loop, 4, "mru").hit_blocks > 25
    often = [[1], [1], [1], [2], [3], [4], [5], [1]]
    assert [simulate(often, 2, name).hit_blocks for name in ("lru", "lfu", "slru")] == [2, 3, 3]


def test_requests_are_taken_in_order_of_time_and_then_of_the_file(tmp_path):
    lines = [LINE | {"timestamp": t, "hash_ids": [i]} for i, t in enumerate([3, 1, 2.5, 1])]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert [request.hash_ids for request in read_trace(path)] == [[1], [3], [2], [0]]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not a JSON object"),
        ("[1]", "not a JSON object"),
        (b"\xff\xfe", "not a JSON object"),
        ("[" * 100_000, "not a JSON object"),
        *((json.dumps({k: v for k, v in LINE.items() if k != name}), f"{name} is missing") for name in LINE),
        (json.dumps(LINE | {"timestamp": "now"}), "timestamp='now' is not a number"),
        (json.dumps(LINE | {"timestamp": float("nan")}), "timestamp=nan is not a number"),
        (json.dumps(LINE | {"input_length": 1.5}), "input_length=1.5 is not a whole number"),
        (json.dumps(LINE | {"output_length": -1}), "output_length=-1 is not a whole number"),
        (json.dumps(LINE | {"hash_ids": 7}), "hash_ids=7 is not a list"),
        (json.dumps(LINE | {"hash_ids": [1, "2"]}), "is not a list of whole numbers"),
        (json.dumps(LINE | {"hash_ids": [1 << 63]}), "is not a list of whole numbers"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, said):
    path = tmp_path / "trace.jsonl"
    good = json.dumps(LINE).encode()
    path.write_bytes(good + b"\n" + (line.encode() if isinstance(line, str) else line) + b"\n" + good + b"\n")
    with pytest.raises(ValueError, match="line 2") as caught:
        read_trace(path)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)
    assert '"hash_ids": [1, 2]' in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_what_cannot_be_simulated_is_refused(tmp_path):
    with pytest.raises(ValueError, match="capacity_blocks=-1 must be at least 0"):
        simulate([[1]], -1)
    with pytest.raises(ValueError, match="eviction='oldest' is unknown; use lru, "):
        simulate([[1]], 4, "oldest")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="no request"):
        read_trace(tmp_path / "empty.jsonl")


def command(*options):
    line = [sys.executable, "-m", "ch07_sglang_radix.benchmarks.bench_prefix", "--simulate", *map(str, options)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_the_command(tmp_path):
    requests = conversations(3)
    trace, out = tmp_path / "trace.jsonl", tmp_path / "made" / "out.json"
    trace.write_text("\n".join(json.dumps(LINE | {"timestamp": i, "hash_ids": ids}) for i, ids in enumerate(requests)))
    done = command("--trace", trace, "--capacity-blocks", 20, "--eviction", "fifo", "--json", out)
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text()) == simulate(requests, 20, "fifo").as_dict()
    assert "requests a minute" in done.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--trace", "missing.jsonl"), "missing.jsonl"),
        (("--trace", ROOT / "README.md"), "README.md, line 1: not a JSON object"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(options, said, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench_prefix", "--simulate", *map(str, options)])
    with pytest.raises((ValueError, OSError)) as told:
        bench_prefix.main()
    assert len(str(told.value).splitlines()) == 1
    assert said in str(told.value)
