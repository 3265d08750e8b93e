"""What the recorder tells is what the scheduler has: at every step, for any workload."""

import json
import random

import pytest

from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.serving.xray.events import merged
from ch07_sglang_radix.serving.xray.recorder import Recorder
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.sampling.params import SamplingParams

SLOTS = 256


def make(page_size=4, slots=SLOTS, **scheduler):
    wrapper = TPRadixAttentionModelWrapper(device="cpu", page_size=page_size, max_total_tokens=slots)
    return TPScheduler(wrapper, check=True, **scheduler)


class Page:
    """What a page makes of the events."""

    def __init__(self):
        self.state, self.seq, self.lines = None, None, []

    def __call__(self, line: bytes) -> None:
        event = json.loads(line)
        self.lines.append(event)
        if event["type"] == "snapshot":
            self.state = event["state"]
        else:
            assert event["seq"] == self.seq + 1
            self.state = merged(self.state, event["change"])
        self.seq = event["seq"]


def tree_of(state) -> dict[tuple, tuple]:
    """{texts from the root: (length, lock, users, hits)}"""
    nodes, tree = state["nodes"], {}
    for node in nodes.values():
        path, at = (), node
        while at:
            path, at = ((at["text"], at["name"]), *path), nodes.get(str(at["parent"]))
        tree[path] = (node["length"], node["lock"], node["users"], node["hits"])
    return tree


def tree_itself(scheduler) -> dict[tuple, tuple]:
    tokenizer, tree = scheduler.wrapper.tokenizer, {}
    users = {}
    for req in scheduler.admitted:
        node = req.last_node
        while node.parent is not None:
            users.setdefault(id(node), []).append(req.rid)
            node = node.parent
    for node in scheduler.tree.nodes():
        path, at = (), node
        while at.parent is not None:
            name = "" if at.extra_key is None else at.extra_key
            path, at = ((tokenizer.decode(at.key.tolist(), False), name), *path), at.parent
        tree[path] = (len(node.key), node.lock_ref, sorted(users.get(id(node), [])), node.hit_count)
    return tree


def owners_itself(scheduler) -> dict[int, str]:
    """{page: free | node | request N}"""
    return {
        page: {"the": "free", "node": "node"}.get(who.split()[0], who)
        for who, pages in scheduler.owners() for page in pages.tolist()
    }  # fmt: skip


def owners_of(state) -> dict[int, str]:
    def name(owner):
        return "free" if owner is None else "node" if owner[0] == "n" else f"request {owner[1:]}"

    return {page: name(state["pages"].get(str(page))) for page in range(state["about"]["num_pages"])}


def compare(state, scheduler) -> None:
    assert tree_of(state) == tree_itself(scheduler)
    assert owners_of(state) == owners_itself(scheduler)
    page_size = scheduler.page_size
    for number, node in state["nodes"].items():
        assert sum(owner == f"n{number}" for owner in state["pages"].values()) * page_size == node["length"]
    totals, s = state["totals"], scheduler
    assert (totals["free_tokens"], totals["evictable_tokens"], totals["protected_tokens"]) == (
        s.pool.free_slots, s.tree.evictable_size, s.tree.protected_size,
    )  # fmt: skip
    assert (totals["waiting"], totals["running"]) == (len(s.waiting), len(s.admitted))
    live = {rid: row for rid, row in state["requests"].items() if row["phase"] not in ("done", "aborted")}
    assert set(live) == {str(req.rid) for req in s.unfinished}
    for req in s.unfinished:
        row = live[str(req.rid)]
        assert (row["phase"] in ("queued", "retracted")) == (req in s.waiting)
        assert (row["computed"], row["out"], row["prompt"]) == (req.kv_len, len(req.output_ids), len(req.prompt_ids))
        assert row["own"] == sum(owner == f"r{req.rid}" for owner in state["pages"].values())


WORDS = ["radix", "tree", "page", "token", "prefix", "cache", "lock", "evict", "split", "node"]


def ask(scheduler, random_, most=24):
    """A prompt that probably begins like others; sometimes in a namespace of its own."""
    begin = random_.choice([["a"] * 12, ["b"] * 9, []])
    ids = scheduler.wrapper.tokenizer.encode(" ".join([*begin, *random_.choices(WORDS, k=random_.randint(1, 14))]))
    params = SamplingParams(max_new_tokens=random_.randint(1, most), ignore_eos=True)
    return scheduler.enqueue(None, ids, params, extra_key=random_.choice([None, None, "tenant"]))


@pytest.mark.parametrize(
    ("page_size", "settings"),
    [(1, {}), (4, {}), (4, {"overlap": True}), (4, {"enable_mixed_chunk": True}), (4, {"disable_radix_cache": True})],
    ids=["page_1", "page_4", "overlap", "mixed", "no_tree"],
)
def test_at_every_step_the_events_are_the_scheduler(page_size, settings):
    scheduler = make(page_size, 160, chunked_prefill_size=32, **settings)
    scheduler.new_token_ratio = 0.1  # bold: so that requests must be sent back
    page, random_ = Page(), random.Random(page_size)
    recorder = Recorder(scheduler, page, share=1.0)
    recorder.start()
    compare(page.state, scheduler)
    asked = steps = 0
    while asked < 28 or scheduler.busy:
        if asked < 28 and random_.random() < 0.6:
            ask(scheduler, random_)
            asked += 1
        if scheduler.unfinished and random_.random() < 0.04:
            scheduler.abort(random_.choice(scheduler.unfinished).rid)
        steps += scheduler.step()
        if scheduler.busy or asked:
            recorder.record()  # what happened between two steps
        compare(page.state, scheduler)
    assert steps > 50
    phases = {
        row["phase"]
        for event in page.lines[1:]
        for row in event["change"].get("requests", {}).values()
        if row and "phase" in row
    }
    assert phases >= {"queued", "prefill", "decode", "done", "aborted"}
    if not settings:
        assert scheduler.retractions > 0
        assert "retracted" in phases
        assert scheduler.tree.evicted > 0
        assert scheduler.tree.splits > 0


def test_who_comes_late_gets_the_state_that_the_others_have():
    scheduler, early, random_ = make(), Page(), random.Random(0)
    recorder = Recorder(scheduler, early, share=1.0)
    recorder.start()
    for _ in range(6):
        ask(scheduler, random_)
        scheduler.step()
    late = Page()
    recorder.publish = lambda line: (early(line), late(line))
    recorder.start()
    assert late.seq == early.seq
    for _ in range(4):
        assert late.state == early.state
        scheduler.step()
    assert len(late.lines) == 5, "one snapshot, and then changes"


def test_at_rest_what_no_step_tells_of_is_told():
    scheduler, page = make(), Page()
    recorder = Recorder(scheduler, page, share=1.0)
    recorder.at_rest()
    recorder.watch(True)
    rid = scheduler.add_request("What is a radix cache?", 20)
    for _ in range(4):
        scheduler.step()
    told = len(page.lines)
    recorder.at_rest()
    assert len(page.lines) == told, "nothing has changed"
    scheduler.abort(rid)
    recorder.at_rest()
    assert page.state["requests"][str(rid)]["phase"] == "aborted"
    scheduler.tree.evict(SLOTS)
    recorder.at_rest()
    assert (page.state["nodes"], page.state["pages"]) == ({}, {})
    recorder.watch(False)
    assert not recorder.on


def test_off_it_is_not_there():
    scheduler, page = make(), Page()
    users, ledger = list(scheduler.after_step), scheduler.tp.ledger
    recorder = Recorder(scheduler, page)
    recorder.record()
    assert (scheduler.after_step, ledger.enabled, ledger.recordings, page.lines) == (users, False, 0, [])
    recorder.start()
    assert ledger.enabled
    recorder.stop()
    recorder.stop()
    assert (scheduler.after_step, ledger.enabled, ledger.recordings) == (users, False, 0)
    recorder.start()
    assert page.lines[-1]["type"] == "snapshot", "and it can be switched on again"
    recorder.stop()


def test_a_decode_step_tells_of_its_requests_and_not_of_the_tree():
    scheduler, page = make(), Page()
    recorder = Recorder(scheduler, page, share=1.0)
    recorder.start()
    rid = scheduler.add_request("What is a radix cache?", 20)
    for _ in range(6):
        scheduler.step()
    change = page.lines[-1]["change"]
    assert "nodes" not in change
    assert set(change["requests"]) == {str(rid)}
    assert len(json.dumps(change)) < 700


def test_when_it_has_had_its_share_steps_are_told_together_and_the_last_one_always():
    scheduler, page = make(), Page()
    recorder = Recorder(scheduler, page, share=0.0)
    recorder.start()
    recorder.credit = 0.0  # the burst is used up
    scheduler.add_request("What is a radix cache?", 12)
    while scheduler.step():
        pass
    assert [event["type"] for event in page.lines] == ["snapshot", "step"]
    assert page.state["now"]["kind"] == "several"
    assert page.state["now"]["step"] == scheduler.step_number > 5
    compare(page.state, scheduler)


def test_it_changes_no_token():
    answers = []
    for watched in (False, True):
        scheduler, random_ = make(), random.Random(3)
        if watched:
            Recorder(scheduler, lambda line: None, share=1.0).start()
        for _ in range(12):
            ask(scheduler, random_)
        answers.append([output.output_ids for output in scheduler.process_requests().values()])
    assert answers[0] == answers[1]


def test_a_page_that_breaks_does_not_break_the_engine(caplog):
    scheduler = make()

    def publish(line):
        if b'"step"' in line[:16]:
            raise OSError("the socket is gone")

    recorder = Recorder(scheduler, publish, share=1.0)
    recorder.start()
    rid = scheduler.add_request("What is a radix cache?", 3)
    assert len(scheduler.process_requests()[rid].output_ids) == 3
    assert not recorder.on
    assert "the socket is gone" in caplog.text


def test_a_large_pool_has_several_pages_in_a_cell(monkeypatch):
    monkeypatch.setattr("ch07_sglang_radix.serving.xray.recorder.MOST_CELLS", 16)
    scheduler, page = make(1), Page()
    Recorder(scheduler, page, share=1.0).start()
    scheduler.add_request("What is a radix cache?", 20)
    scheduler.step()
    about = page.state["about"]
    assert (about["cells"], about["pages_per_cell"], about["num_pages"]) == (16, 16, SLOTS)
    owned = owners_itself(scheduler)
    used = {str(cell) for cell in range(16) if any(owned[16 * cell + i] != "free" for i in range(16))}
    assert set(page.state["pages"]) == used


def test_a_large_tree_shows_what_was_used_last(monkeypatch):
    monkeypatch.setattr("ch07_sglang_radix.serving.xray.tree_rows.MOST_NODES", 3)
    scheduler, page = make(), Page()
    Recorder(scheduler, page, share=1.0).start()
    for word in "abcdefgh":
        scheduler.add_request(f"{word} is the first word, and others follow it", 2)
    newest = scheduler.process_requests()
    nodes, left_out = page.state["nodes"], page.state["totals"]["nodes_left_out"]
    assert len(nodes) + left_out == len(list(scheduler.tree.nodes()))
    assert left_out > 0
    assert all(str(node["parent"]) in nodes or node["parent"] == 0 for node in nodes.values())
    assert len(newest) == 8
    assert "x" in page.state["pages"].values()


def test_without_a_tokenizer_texts_are_ids():
    wrapper = TPRadixAttentionModelWrapper(device="cpu", page_size=4, max_total_tokens=SLOTS, skip_tokenizer_init=True)
    scheduler, page = TPScheduler(wrapper), Page()
    Recorder(scheduler, page, share=1.0).start()
    scheduler.add_request(input_ids=list(range(100, 116)), max_new_tokens=4)
    scheduler.step()
    (node,) = page.state["nodes"].values()
    assert node["text"] == " ".join(map(str, range(100, 116)))


@pytest.mark.parametrize(("replica", "shown"), [(None, ""), (0, "replica 0 alone"), (3, "replica 3 alone")])
def test_of_several_replicas_a_page_says_which_it_shows(replica, shown):
    page = Page()
    Recorder(make(), page, share=1.0, replica=replica).start()
    assert page.state["about"]["shows"] == shown


def test_of_several_data_ranks_a_page_shows_the_first_and_says_so():
    scheduler, page = make(), Page()
    scheduler.data_ranks.append(scheduler)
    Recorder(scheduler, page, share=1.0).start()
    assert page.state["about"]["shows"] == "data rank 0 of 2"


def test_two_ranks_tell_what_they_send(ranks):
    assert ranks(2).run(sent_on_two_ranks)[0] == []


def sent_on_two_ranks():
    """Returns what is wrong."""
    wrapper = TPRadixAttentionModelWrapper(device="cpu", page_size=4, max_total_tokens=SLOTS)
    scheduler, page = TPScheduler(wrapper), Page()
    if scheduler.tp.rank == 0:
        Recorder(scheduler, page, share=1.0).start()
    scheduler.add_request("What is a radix cache?", 4)
    scheduler.process_requests()
    if scheduler.tp.rank > 0:
        return []
    layers = wrapper.config.num_layers
    sent = [event["change"]["sent"] for event in page.lines[1:] if "sent" in event["change"]]
    wrong = []
    for rows in sent:
        calls = {(op, label): n for op, label, n, _, _ in rows}
        if not rows:
            continue
        for what, n in {
            ("all_reduce", "embed_tokens"): 1,
            ("all_reduce", "o_proj"): layers,
            ("all_reduce", "down_proj"): layers,
        }.items():
            if calls.get(what) != n:
                wrong.append((what, calls))
        if any(wire != {"all_reduce": 2, "gather": 1, "broadcast": 1}[op] * size_ for op, _, _, size_, wire in rows):
            wrong.append(rows)
    return wrong if len(sent) >= 2 else ["too few steps"]
