from types import ModuleType
from unittest.mock import patch

from ch07_sglang_radix import admission
from ch07_sglang_radix.exercises.checks.engines import an_engine, answers, nothing_held, same, some_prompts
from ch07_sglang_radix.exercises.checks.trees import a_req, memory_of
from ch07_sglang_radix.prefill_adder import Answer, PrefillAdder
from common.teaching.expect import ask, expect

PREFIX, OTHER = list(range(8)), list(range(100, 106))


def check(m: ModuleType) -> None:
    for num_pages, promised, new, why in (
        (6, 0, 6, "8 more slots are needed, 4 are free, and the 8 of its own prefix cannot be evicted for it"),
        (9, 5, 6, "8 more slots are needed, 10 are free, 5 of them promised"),
        (9, 1, 7, "9 more tokens take whole pages, 10 slots, and 10 are free, 1 of them promised"),
        (8, 1, 6, "8 more slots are needed, 8 are free, 1 of them promised"),
    ):
        _check_refused(m, num_pages, promised, new, why)
    _check_admitted(m)

    class Adder(PrefillAdder):
        def _reserve(self, req, match):
            return Answer.ADDED if m.reserve(self.memory, req, match, self.promised) else Answer.FULL

    prompts = some_prompts(8, 16)
    want = answers(an_engine(), prompts, 12)
    with patch.object(admission, "PrefillAdder", Adder):
        engine = an_engine(pool=64)
        same(answers(engine, prompts[:1], 12), want[:1])  # leaves the shared prefix in the tree
        same(answers(engine, prompts, 12), want)
    nothing_held(engine)


def _check_refused(m: ModuleType, num_pages: int, promised: float, new: int, why: str) -> None:
    memory = memory_of(num_pages, PREFIX)
    tree, req = memory.tree, a_req(0, [*PREFIX, 50, 51], max_new_tokens=new)
    got_in = ask(m.reserve, memory, req, tree.match_prefix(req.all_ids[:-1]), promised, why=f"False: {why}")
    expect(f"{why}: does it get in", got_in, False)
    expect("slots that are locked after that: who does not get in leaves no lock behind", tree.protected_size, 0)
    expect("free rows, row of the request: who does not get in has none", (memory.rows.num_free, req.row), (4, -1))
    expect("slots that can be had after that: everything is as it was", memory.obtainable_slots(), 2 * num_pages)


def _check_admitted(m: ModuleType) -> None:
    for num_pages, promised, why in (
        (9, 0, "8 slots are needed, 4 are free and 6 can be evicted"),
        (9, 2, "8 slots are needed, 4 are free, 6 can be evicted, 2 of the ten promised: it fits exactly"),
    ):
        memory = memory_of(num_pages, OTHER, PREFIX)  # two pages are free, three more can be evicted
        tree, req = memory.tree, a_req(0, [*PREFIX, 50, 51], max_new_tokens=6)
        match = tree.match_prefix(req.all_ids[:-1])
        expect(f"{why}: does it get in", ask(m.reserve, memory, req, match, promised), True)
        expect("memory.admit gives it a row and its prefix; prefix_len", req.prefix_len, 8)
        expect("is last_node the end of the match", req.last_node is match.last_node, True)
        expect("slots that are locked: its path", tree.protected_size, 8)
        expect("lock_ref of its last node: locked once", match.last_node.lock_ref, 1)
        tree.match_prefix(OTHER)  # somebody else has asked for it: now the prefix is what was used longest ago
        memory.grow(req, 16)
        slots = memory.rows.req_to_token[req.row, :16].tolist()
        expect("different slots of its row: its own prefix must not be evicted for it", len(set(slots)), 16)
