"""Who may run together: the limit holds, and nobody waits longer than those who run at the time need to their end."""

from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace

from hypothesis import given, settings
from hypothesis import strategies as st

from ch07_sglang_radix.adapters.gate import PATIENCE, LoRAGate


@dataclass(eq=False)
class Asked:
    rid: int
    lora_id: str | None
    length: int
    done: int = 0
    passed_over: int = 0
    waited: int = field(default=0)  # steps since it was overdue

    @property
    def max_len(self):
        return self.length

    @property
    def seq_len(self):
        return self.done


class Queue:
    """A prefill step for whoever may, then a decode step for whoever runs; `rows` requests run at most, as there are pages."""

    def __init__(self, limit, pinned=(), rows=100):
        self.gate = LoRAGate(SimpleNamespace(max_loras_per_batch=limit, pinned=set(pinned)), lambda identity: True)
        self.waiting, self.running, self.rows, self.limit, self.pinned = [], [], rows, limit, set(pinned)

    def step(self):
        self.gate.look(self.running, self.waiting)
        added = []
        for req in self.waiting:
            if len(self.running) + len(added) < self.rows and self.gate(req, 0):
                added.append(req)
        last = max((i for i, req in enumerate(self.waiting) if req in added), default=-1)
        for req in self.waiting:
            req.waited += req.passed_over >= PATIENCE and req not in added
        for req in self.waiting[: last + 1]:
            req.passed_over += req not in added
        self.running += added
        self.waiting = [req for req in self.waiting if req not in added]
        assert len({req.lora_id for req in self.running if req.lora_id} | self.pinned) <= self.limit
        for req in self.running:
            req.done += 1
        self.running = [req for req in self.running if req.done < req.length]
        return added


def ask(queue, identity, length=5):
    queue.waiting.append(Asked(ask.count, identity, length))
    ask.count += 1
    return queue.waiting[-1]


ask.count = 0


def test_the_base_needs_no_place_and_an_adapter_that_runs_takes_further_requests():
    queue = Queue(1)
    first, other, base, same = (ask(queue, one) for one in ("a", "b", None, "a"))
    assert queue.step() == [first, base, same]
    assert queue.waiting == [other]


def test_a_place_comes_free_with_its_last_request_and_goes_to_who_waits():
    queue = Queue(1)
    ask(queue, "a", 2), ask(queue, "a", 4)
    other = ask(queue, "b")
    for _ in range(4):
        assert other not in queue.step()
    assert queue.step() == [other]


def test_an_adapter_that_is_always_asked_for_does_not_keep_its_place_for_ever():
    """The mistake that runs for ever: whoever's adapter runs may enter, and its place never comes free."""
    queue, entered = Queue(1), []
    ask(queue, "a")
    other = ask(queue, "b")
    for step in range(40):
        ask(queue, "a")  # one more at every step
        entered += [(step, req) for req in queue.step()]
    assert other in [req for _, req in entered]
    assert other.waited <= 5


def test_of_two_adapters_that_run_the_one_that_is_done_sooner_drains():
    queue = Queue(2)
    ask(queue, "long", 30), ask(queue, "short", 8)
    other = ask(queue, "b")
    for _ in range(PATIENCE):
        ask(queue, None)
        queue.step()
    ask(queue, "long"), ask(queue, "short")
    added = queue.step()
    assert [req.lora_id for req in added] == ["long"]
    assert queue.gate.draining == {"short": other.rid}


def test_who_came_before_the_overdue_one_may_still_enter():
    queue = Queue(1, rows=2)
    ask(queue, "a", 9)
    queue.step()
    early = ask(queue, "a", 3)
    other = ask(queue, "b")
    other.passed_over = PATIENCE
    late = ask(queue, "a", 3)
    assert queue.step() == [early]
    assert queue.waiting == [other, late]


def test_a_free_place_is_for_the_oldest_overdue_one_whatever_order_a_policy_asks_in():
    queue = Queue(2)
    ask(queue, "a", 30)
    queue.step()
    old, new = ask(queue, "b"), ask(queue, "c")
    old.passed_over = PATIENCE
    queue.waiting.reverse()
    assert queue.step() == [old]
    assert queue.waiting == [new]


def test_a_pinned_adapter_keeps_its_place_and_never_drains():
    queue = Queue(2, pinned=["p"])
    ask(queue, "p", 30), ask(queue, "a", 20)
    other = ask(queue, "b")
    for _ in range(PATIENCE + 1):
        ask(queue, None)
        queue.step()
    assert list(queue.gate.draining) == ["a"]
    ask(queue, "p")
    assert [req.lora_id for req in queue.step()] == ["p"]
    assert other in queue.waiting


arrivals = st.lists(
    st.tuples(st.integers(0, 30), st.sampled_from([None, "a", "a", "a", "b", "b", "c", "d", "e"]), st.integers(1, 12)),
    min_size=1, max_size=60,
)  # fmt: skip


@settings(deadline=None)
@given(limit=st.integers(1, 4), rows=st.integers(1, 12), coming=arrivals)
def test_everybody_gets_a_turn_within_what_runs_and_what_came_before(limit, rows, coming):
    """Whatever arrives when: the limit holds at every step (see Queue.step), and an overdue request waits for those alone that run
    or came before it, each for its own length at most."""
    queue, step, everybody = Queue(limit, rows=rows), 0, []
    coming = sorted(coming, key=lambda one: one[0])
    while coming or queue.waiting or queue.running:
        while coming and coming[0][0] <= step:
            everybody.append(ask(queue, *coming.pop(0)[1:]))
        queue.step()
        step += 1
        assert step < 2000, "somebody never gets in"
    for i, req in enumerate(everybody):
        before = sum(one.length for one in everybody[:i])
        running = max((one.length for one in everybody), default=0) * rows
        assert req.waited <= before + running


def test_with_four_on_two_places_each_is_served_while_all_are_asked_for_without_end():
    queue, served = Queue(2), {}
    for step in range(400):
        for identity in "abcd":
            if step % 2 == 0:
                ask(queue, identity, 6)
        for req in queue.step():
            served.setdefault(req.lora_id, []).append(step)
    gaps = {one: max(b - a for a, b in pairwise(steps)) for one, steps in served.items()}
    assert set(gaps) == set("abcd")
    assert max(gaps.values()) <= 60
