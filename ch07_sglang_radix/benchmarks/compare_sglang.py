"""Tree and schedule policies beside SGLang's own, operation by operation.

    pip download sglang==0.5.23 --no-deps && unzip -q sglang-0.5.23-*.whl -d sglang-0.5.23
    python -m ch07_sglang_radix.benchmarks.compare_sglang sglang-0.5.23

Three files of the release are run as they are, srt/mem_cache/radix_cache.py, srt/mem_cache/evict_policy.py and
srt/managers/schedule_policy.py; whatever else they import is a stand-in, so nothing has to be installed. Their clock is
a counter, as ours is. Random histories of insert, match, lock, unlock and evict must give the same tree (keys, slots, hits,
locks, priorities) and evict the same slots in the same order; random queues must come out in the same order.
"""

import argparse
import importlib.abc
import importlib.machinery
import importlib.util
import itertools
import random
import sys
import types
from array import array
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import torch
from tqdm import trange

from ch07_sglang_radix.eviction import STRATEGIES
from ch07_sglang_radix.memory_pool import TokenToKVPool
from ch07_sglang_radix.radix_cache import RadixCache
from ch07_sglang_radix.request import Req
from ch07_sglang_radix.schedule_policy import SchedulePolicy
from common.distributed.launch import run_main
from common.sampling.params import SamplingParams

TREE, POLICY = "sglang.srt.mem_cache.radix_cache", "sglang.srt.managers.schedule_policy"
AS_THEY_ARE = {TREE, POLICY, "sglang.srt.mem_cache.evict_policy", "sglang.srt.mem_cache.base_prefix_cache"}
COMPARED = ("fcfs", "lof", "routing-key", "lpm", "dfs-weight", "hrrn", "shortest-prefill-first")  # not random


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """The three files from `folder`; every other module of sglang is empty, and every name in it a mock."""

    def __init__(self, folder: Path):
        self.folder = folder

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] != "sglang":
            return None
        if name in AS_THEY_ARE:
            return importlib.util.spec_from_file_location(name, self.folder / (name.replace(".", "/") + ".py"))
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__path__ = []
        module.__getattr__ = lambda name: _no_setting() if name == "envs" else MagicMock(name=name)
        return module

    def exec_module(self, module):
        pass


def _no_setting() -> MagicMock:
    """Environment variables: none is set."""
    envs = MagicMock()
    envs.configure_mock(**{"SGLANG_PREFILL_TILE_BUDGET_MODE.get.return_value": "compact"})
    envs.SGLANG_RADIX_FORCE_MISS.get.return_value = envs.SGLANG_ENABLE_WAITING_PREFIX_REFRESH.get.return_value = False
    return envs


def load(folder: Path) -> tuple[types.ModuleType, types.ModuleType]:
    """SGLang's tree and policies."""
    if not (folder / "sglang" / "srt").is_dir():
        raise FileNotFoundError(f"{folder}/sglang/srt does not exist; unpack the wheel of sglang 0.5.23 into {folder}")
    sys.meta_path.insert(0, StandIns(folder))
    tree, policy = importlib.import_module(TREE), importlib.import_module(POLICY)
    evict = importlib.import_module("sglang.srt.mem_cache.evict_policy")
    tree.get_eviction_strategy = lambda name, config=None: getattr(evict, f"{_class_name(name)}Strategy")()
    tree.split_node_hash_value = lambda *args: (None, None)
    tree.time = types.SimpleNamespace(monotonic=itertools.count(1).__next__, perf_counter=lambda: 0)
    # the tree of what is waiting, which their policies make for themselves
    plain = {"is_eagle": False, "eviction_policy": "lru", "enable_metrics": False}
    tree.CacheInitParams = lambda **params: MagicMock(**params, **plain)
    policy.match_kv_cache, policy._ROUTING_KEY_POLICY_DEBUG_LOG = _match_kv_cache, False
    return tree, policy


def _class_name(strategy: str) -> str:
    return "Priority" if strategy == "priority" else strategy.upper()


def _match_kv_cache(req, tree, token_ids=None):
    """srt/mem_cache/common.py, without host tiers."""
    found = tree.match_prefix(types.SimpleNamespace(key=_key(req.origin_input_ids + req.output_ids, req.extra_key)))
    req.prefix_len, req.last_node = found.device_prefix_len, found.last_device_node
    req.num_matched_prefix_tokens = min(req.prefix_len, len(req.origin_input_ids) + len(req.output_ids) - 1)
    return found


def _key(ids: list[int], extra_key: str | None):
    return sys.modules[TREE].RadixKey(array("q", ids), extra_key)


def their_tree(module, strategy: str, page_size: int, freed: list[int]):
    """A RadixCache of theirs that writes what it frees into `freed`."""
    allocator = types.SimpleNamespace(device="cpu", free_segment=lambda value, start_pos: freed.extend(value.tolist()))
    params = MagicMock(
        disable=False, token_to_kv_pool_allocator=allocator, page_size=page_size, is_eagle=False,
        eviction_policy=strategy, enable_metrics=False, enable_kv_cache_events=False,
    )  # fmt: skip
    return module.RadixCache(params)


def one_history(module, seed: int, length: int) -> None:
    """Random operations on both trees. Raises AssertionError at the first difference."""
    rng, freed, mine = random.Random(seed), [], []
    strategy, page_size = rng.choice(list(STRATEGIES)), rng.choice((1, 1, 2, 4))
    theirs = their_tree(module, strategy, page_size, freed)
    ours = RadixCache(TokenToKVPool(page_size=page_size), eviction=strategy)
    ours.pool.free = lambda value: mine.extend(value.tolist())
    locked, slot = [], 0
    for _ in range(length):
        ids, name = [rng.randrange(3) for _ in range(rng.randrange(14))], rng.choice((None, None, "a", "b"))
        what, n = rng.random(), len(ids) // page_size * page_size
        where = f"history {seed}, {strategy}, pages of {page_size}"
        if what < 0.4 and n:
            priority, before = rng.randrange(3), rng.choice((0, 0, rng.randrange(10))) // page_size * page_size
            slots = np.arange(slot, slot := slot + n)
            params = types.SimpleNamespace(
                key=_key(ids, name), value=torch.from_numpy(slots), priority=priority, inserted_len=before
            )
            known = theirs.insert(params).prefix_len, ours.insert(ids, slots, name, priority, before)
            assert known[0] == known[1], f"{where}: insert found {known[0]} tokens there, here {known[1]}"
        elif what < 0.7:
            node = theirs.match_prefix(types.SimpleNamespace(key=_key(ids, name))).last_device_node
            match, slots = ours.match_prefix(ids, name), theirs.path_device_indices(node).tolist()
            assert match.slots.tolist() == slots, f"{where}: {ids} has slots {slots} there, here {match.slots.tolist()}"
            if what < 0.5:
                theirs.inc_lock_ref(node)
                ours.inc_lock_ref(match.last_node)
                locked.append((node, match.last_node))
        elif what < 0.8 and locked:
            node, my_node = locked.pop(rng.randrange(len(locked)))
            theirs.dec_lock_ref(node)
            ours.dec_lock_ref(my_node)
        else:
            wanted = rng.randrange(1, 9)
            theirs.evict(types.SimpleNamespace(num_tokens=wanted))
            ours.evict(wanted)
            assert freed == mine, f"{where}: slots {freed[-9:]} go there, here {mine[-9:]}"
        left, right = _shape(theirs.root_node), _shape(ours.root)
        assert left == right, f"{where}: the tree is {left} there, here {right}"


def _shape(node) -> list:
    """What is below a node, of theirs or of ours."""
    children = []
    for child in node.children.values():
        theirs = hasattr(child.key, "token_ids")
        name = child.key.extra_key if theirs else child.extra_key
        key = list(child.key.token_ids) if theirs else child.key.tolist()
        children.append(
            (str(name), key, child.value.tolist(), child.hit_count, child.lock_ref, child.priority, _shape(child))
        )
    return sorted(children)


def one_queue(tree_module, policy_module, seed: int) -> None:
    """A random tree and queue, ordered by every policy. Raises AssertionError at the first difference."""
    rng = random.Random(seed)
    heads = [[100 * h + i for i in range(90)] for h in range(4)]
    cached = [rng.choice(heads)[: rng.choice((8, 20, 33, 60))] for _ in range(3)]
    prompts = [
        rng.choice(heads)[: rng.choice((0, 9, 31, 40, 80))] + [rng.randrange(9)] * rng.randint(1, 9) for _ in range(9)
    ]
    fields = [
        {"rid": i, "extra_key": rng.choice((None, None, "a")), "routing_key": rng.choice((None, "x", "y")), "n": rng.randint(1, 9)}
        for i in range(len(prompts))
    ]  # fmt: skip
    running, came, computed = [rng.choice((None, "x", "y")) for _ in range(4)], rng.choices(range(500), k=9), 500
    for name in COMPARED:
        theirs, ours = their_tree(tree_module, "lru", 1, []), RadixCache(TokenToKVPool(page_size=1))
        for key in cached:
            value = np.arange(len(key))
            theirs.insert(
                types.SimpleNamespace(key=_key(key, None), value=torch.from_numpy(value), priority=0, inserted_len=0)
            )
            ours.insert(key, value)
        queue = [
            MagicMock(
                origin_input_ids=array("q", prompt), output_ids=array("q"), rid=f["rid"], extra_key=f["extra_key"],
                cache_salt=None, routing_key=f["routing_key"], arrival_processed_tokens=at,
                sampling_params=MagicMock(max_new_tokens=f["n"]), time_stats=MagicMock(wait_queue_entry_time=f["rid"]),
            )
            for prompt, f, at in zip(prompts, fields, came, strict=True)
        ]  # fmt: skip
        batch = types.SimpleNamespace(reqs=[types.SimpleNamespace(routing_key=key) for key in running])
        policy_module.SchedulePolicy(name, theirs, False, False, False).calc_priority(queue, batch, computed)
        mine = SchedulePolicy(name, ours)
        waiting = [
            Req(
                f["rid"],
                None,
                prompt,
                SamplingParams(max_new_tokens=f["n"]),
                0,
                f["extra_key"],
                routing_key=f["routing_key"],
            )
            for prompt, f in zip(prompts, fields, strict=True)
        ]
        mine._came_at, mine._computed = dict(enumerate(came)), computed
        got, want = [req.rid for req in mine.order(waiting, batch.reqs)], [req.rid for req in queue]
        assert got == want, f"queue {seed}, {name}: {want} there, here {got}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the wheel of sglang 0.5.23 was unpacked")
    parser.add_argument("--histories", type=int, default=1500, help="of 120 operations each (default 1500)")
    parser.add_argument("--queues", type=int, default=200, help="of 9 requests each (default 200)")
    args = parser.parse_args()
    tree, policy = load(args.folder)
    for seed in trange(args.histories, desc="histories", leave=False, disable=None):
        one_history(tree, seed, length=120)
    for seed in trange(args.queues, desc="queues", leave=False, disable=None):
        one_queue(tree, policy, seed)
    print(
        f"{120 * args.histories:,} operations under {', '.join(STRATEGIES)}: the same tree, evicted in the same order"
    )
    print(f"{args.queues:,} queues under {', '.join(COMPARED)}: the same order")


if __name__ == "__main__":
    run_main(main)
