"""The checks of the exercises: they pass the solutions, catch wrong answers, and leave a fresh clone green."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ch07_sglang_radix.exercises.check import module_of, outcome
from ch07_sglang_radix.exercises.checks import CHECKS
from ch07_sglang_radix.tasks import PageUpdate

FOLDER = Path(__file__).parents[2] / "ch07_sglang_radix" / "exercises"


@pytest.mark.parametrize("number", CHECKS)
def test_my_answer(number):
    """The reader's own: skipped until it is started."""
    said = outcome(number, module_of(number))
    if said == "not started":
        pytest.skip(said)
    assert said == "passed"


@pytest.mark.parametrize("number", CHECKS)
def test_the_solution_passes(number):
    assert outcome(number, module_of(number, solutions=True)) == "passed"


@pytest.mark.parametrize("number", CHECKS)
def test_the_anatomy_is_the_same_everywhere(number):
    text = Path(module_of(number).__file__).read_text(encoding="utf-8")
    assert re.match(rf'"""Exercise {number}: .+ \(\d\d minutes\)\.\n\nRead  .+\nEdit  this file\nTest  python -m '
                    rf"ch07_sglang_radix.exercises.check {number}\n", text)  # fmt: skip
    assert "raise NotImplementedError  # your turn" in text
    for file in re.search(r"Read  (.+)\n", text).group(1).replace(";", ",").split(","):
        name = file.strip().split(" ")[0]
        if name.endswith(".py"):
            assert (FOLDER.parents[1] / name).exists(), name


def test_the_table_of_the_readme_is_what_the_files_say():
    rows = re.findall(r"\| (\d+) \| \[(.+)\]\((.+)\) \| (\d+) min \| (.+) \|", (FOLDER / "README.md").read_text())
    assert [int(row[0]) for row in rows] == list(CHECKS)
    for number, title, file, minutes, read in rows:
        text = (FOLDER / file).read_text(encoding="utf-8")
        assert text.startswith(f'"""Exercise {number}: {title} ({minutes} minutes).\n\nRead  {read}\n')


def right(number):
    return module_of(number, solutions=True)


# --- 1: the tree


def new_node_below(node, n):
    """The old node becomes the upper half: who holds it as the end of its path has lost the rest."""
    lower = {"key": node["key"][n:], "slots": node["slots"][n:], "children": node["children"], "parent": node,
             "lock_ref": node["lock_ref"]}  # fmt: skip
    for child in lower["children"].values():
        child["parent"] = lower
    node["key"], node["slots"], node["children"] = node["key"][:n], node["slots"][:n], {lower["key"][0]: lower}
    return node


def no_lock_inherited(node, n):
    upper = right(1).split(node, n)
    upper["lock_ref"] = 0
    return upper


def whole_edges_only(root, tokens):
    node, slots = root, []
    while True:
        rest = tokens[len(slots) :]
        child = node["children"].get(rest[0]) if rest else None
        if child is None or rest[: len(child["key"])] != child["key"]:
            return slots, node
        node, slots = child, slots + child["slots"]


def no_split(root, tokens):
    slots, node = whole_edges_only(root, tokens)
    rest = tokens[len(slots) :]
    child = node["children"].get(rest[0]) if rest else None
    if child:
        n = next((i for i, (a, b) in enumerate(zip(rest, child["key"], strict=False)) if a != b), len(rest))
        slots = slots + child["slots"][:n]
    return slots, node


# --- 2: pages


def unfloored(a, b, page_size):
    n = min(len(a), len(b))
    return int((a[:n] == b[:n]).cumprod().sum())


# --- 3: eviction


def forgets_locks(nodes):
    return min((node for node in nodes if not node.children), key=right(3).lfu, default=None)


def forgets_children(nodes):
    return min((node for node in nodes if node.lock_ref == 0), key=right(3).lfu, default=None)


# --- 4: the queue


def by_match_only(waiting, tree):
    return sorted(waiting, key=lambda req: -len(tree.match_prefix(req.all_ids[:-1]).slots))


def _lpm(waiting, tree, *, enough=32, last=-1, limit=128, leader_waits=False):
    if len(waiting) > limit:
        return list(waiting)
    ids = [req.all_ids[: len(req.all_ids) + last] for req in waiting]
    matched = [len(tree.match_prefix(one).slots) for one in ids]
    follows = [False] * len(waiting)
    for i in range(len(waiting)):
        for j in range(len(waiting) if leader_waits else i):
            alike = right(4).shared_length(ids[i], ids[j]) >= 32 and i != j
            follows[i] |= alike and max(matched[i], matched[j]) <= enough and (leader_waits or not follows[j])
    return [waiting[i] for i in sorted(range(len(waiting)), key=lambda i: (follows[i], -matched[i]))]


# --- 5: admission


def _fits(memory, req, match, promised):
    return memory.whole_pages(req.max_len) - len(match.slots) <= memory.obtainable_slots() - promised


def count_then_lock(memory, req, match, promised):
    if not _fits(memory, req, match, promised):
        return False
    memory.tree.inc_lock_ref(match.last_node)
    memory.admit(req, match)
    return True


def never_lock(memory, req, match, promised):
    memory.tree.inc_lock_ref(match.last_node)
    fits = _fits(memory, req, match, promised)
    memory.tree.dec_lock_ref(match.last_node)
    if fits:
        memory.admit(req, match)
    return fits


def keeps_the_lock(memory, req, match, promised):
    memory.tree.inc_lock_ref(match.last_node)
    if not _fits(memory, req, match, promised):
        return False
    memory.admit(req, match)
    return True


# --- 6: the hand-over


def forgets_the_page_tables(tree, req):
    sent = req.sent_len
    right(6).cache_unfinished_req(tree, req)
    req.sent_len = sent


def _hand_over(tree, req, *, free="duplicates", rewrite=True, move_lock=True):
    ids, row = req.all_ids[: req.kv_len], tree.req_to_token.req_to_token[req.row]
    known = tree.insert(ids, row)
    match = tree.match_prefix(ids)
    first = 0 if free == "all known" else req.prefix_len
    if free == "after rewriting":
        row[: len(match.slots)] = match.slots
    if known > req.prefix_len and free != "nothing":
        tree.pool.free(row[first:known])
        req.sent_len = min(req.sent_len, req.prefix_len)
    if rewrite:
        row[: len(match.slots)] = match.slots
    tree.inc_lock_ref(match.last_node)
    if move_lock:
        tree.dec_lock_ref(req.last_node)
    req.last_node, req.prefix_len = match.last_node, len(match.slots)


# --- 7: the fully cached prompt


def no_cap(tree, prompt):
    slots = tree.match_prefix(prompt).slots
    return slots, prompt[len(slots) :]


def cap_after_the_match(tree, prompt):
    slots = tree.match_prefix(prompt).slots[: len(prompt) - 1]
    return slots, prompt[len(slots) :]


def all_again(tree, prompt):
    slots, tokens = no_cap(tree, prompt)
    return (slots, tokens) if tokens else (slots[:0], prompt)


# --- 8: overlap


def ends_twice(reqs, tokens, finish):
    for req, token in zip(reqs, tokens, strict=True):
        if not req.finish_reason:
            req.take_token(token, None)
        if req.finish_reason:
            req.kv_len = len(req.all_ids) - 1
            finish(req)


def takes_the_token_too_many(reqs, tokens, finish):
    for req, token in zip(reqs, tokens, strict=True):
        had_ended = req.finish_reason
        req.take_token(token, None)
        if req.finish_reason and not had_ended:
            req.kv_len = len(req.all_ids) - 1
            finish(req)


def counts_the_step_on_its_way(reqs, tokens, finish):
    def with_the_old_length(req):
        req.kv_len = before[req]
        finish(req)

    before = {req: req.kv_len for req in reqs}
    right(8).settle(reqs, tokens, with_the_old_length)


def tokens_of_the_wrong_requests(reqs, tokens, finish):
    still = [req for req in reqs if not req.finish_reason]
    right(8).settle(still, tokens[: len(still)], finish)


# --- 9: page updates


def says_everything(reqs, table, page_size):
    for req in reqs:
        req.sent_len = 0
    return right(9).page_updates(reqs, table, page_size)


def _updates(reqs, table, page_size, *, step=None, first=1, remember=True, empty=False):
    updates = []
    for req in reqs:
        slots = table[req.row, req.sent_len : req.allocated_len : page_size]
        if empty or len(slots):
            updates.append(PageUpdate(req.row, req.sent_len // (page_size * first) if first else req.sent_len,
                                      tuple((slots // (step or page_size)).tolist())))  # fmt: skip
        if remember:
            req.sent_len = req.allocated_len
    return tuple(updates)


# --- 10: retraction


def _retract(running, lacks_room, release, *, key, stay=1, ask_once=False):
    order, gone = sorted(running, key=key), []
    lacks = lacks_room()
    while len(running) > stay and lacks:
        req = order.pop(0)
        running.remove(req)
        release(req)
        gone.append(req)
        lacks = ask_once or lacks_room()
    return gone


def _loss(req):
    return len(req.output_ids), -len(req.prompt_ids)


def forgets_the_list(running, lacks_room, release):
    return right(10).retract(list(running), lacks_room, release)


def _with(function, **options):
    return lambda *args: function(*args, **options)


WRONG = [
    (1, {"split": new_node_below}),
    (1, {"split": no_lock_inherited}),
    (1, {"match_prefix": whole_edges_only}),
    (1, {"match_prefix": no_split}),
    (2, {"aligned": lambda ids, page_size: ids}),
    (2, {"child_key": lambda key, page_size: int(key[0])}),
    (2, {"child_key": lambda key, page_size: tuple(key.tolist())}),
    (2, {"common_length": unfloored}),
    (3, {"lfu": lambda node: node.last_access_time}),
    (3, {"lfu": lambda node: node.hit_count}),
    (3, {"lfu": lambda node: (-node.hit_count, node.last_access_time)}),
    (3, {"victim": forgets_locks}),
    (3, {"victim": forgets_children}),
    (4, {"lpm": by_match_only}),
    (4, {"lpm": _with(_lpm, leader_waits=True)}),
    (4, {"lpm": _with(_lpm, enough=999)}),
    (4, {"lpm": _with(_lpm, enough=0)}),
    (4, {"lpm": _with(_lpm, last=0)}),
    (4, {"lpm": _with(_lpm, limit=999)}),
    (5, {"reserve": count_then_lock}),
    (5, {"reserve": never_lock}),
    (5, {"reserve": keeps_the_lock}),
    (5, {"reserve": lambda memory, req, match, promised: right(5).reserve(memory, req, match, 0)}),
    (6, {"cache_unfinished_req": forgets_the_page_tables}),
    (6, {"cache_unfinished_req": _with(_hand_over, free="all known")}),
    (6, {"cache_unfinished_req": _with(_hand_over, free="nothing")}),
    (6, {"cache_unfinished_req": _with(_hand_over, free="after rewriting")}),
    (6, {"cache_unfinished_req": _with(_hand_over, rewrite=False)}),
    (6, {"cache_unfinished_req": _with(_hand_over, move_lock=False)}),
    (7, {"split_prompt": no_cap}),
    (7, {"split_prompt": cap_after_the_match}),
    (7, {"split_prompt": all_again}),
    (7, {"split_prompt": lambda tree, prompt: (np.zeros(0, dtype=np.int64), prompt)}),
    (8, {"settle": ends_twice}),
    (8, {"settle": takes_the_token_too_many}),
    (8, {"settle": counts_the_step_on_its_way}),
    (8, {"settle": tokens_of_the_wrong_requests}),
    (9, {"page_updates": says_everything}),
    (9, {"page_updates": _with(_updates, remember=False)}),
    (9, {"page_updates": _with(_updates, step=1)}),
    (9, {"page_updates": _with(_updates, first=0)}),
    (9, {"page_updates": _with(_updates, empty=True)}),
    (10, {"retract": _with(_retract, key=lambda req: -req.rid)}),
    (10, {"retract": _with(_retract, key=lambda req: -len(req.output_ids))}),
    (10, {"retract": _with(_retract, key=lambda req: (len(req.output_ids), len(req.prompt_ids)))}),
    (10, {"retract": _with(_retract, key=_loss, stay=0)}),
    (10, {"retract": _with(_retract, key=_loss, ask_once=True)}),
    (10, {"retract": forgets_the_list}),
]


@pytest.mark.parametrize(("number", "instead"), WRONG)
def test_a_plausible_wrong_answer_is_caught(number, instead):
    answer = SimpleNamespace(
        **{name: value for name, value in vars(right(number)).items() if callable(value)} | instead
    )
    said = outcome(number, answer)
    assert said.startswith("not yet: ")
    assert "an example of the check fails" not in said, "the reader should hear why"


def test_every_exercise_has_a_wrong_answer_that_is_caught():
    assert {number for number, _ in WRONG} == set(CHECKS)
