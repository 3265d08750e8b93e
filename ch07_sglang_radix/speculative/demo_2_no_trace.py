"""What was guessed wrong leaves nothing behind: a request's slots step by step, and the tree and the pool after its end.

    python ch07_sglang_radix/speculative/demo_2_no_trace.py

One request whose guesses are made to be right now and then: five a step, of which 5, 0, 2, 1, 3 and again are right. The answer is
known from an engine that does not guess. At the end both engines have the same tree and as many free pages. And a mistake is
planted: a length that has moved on by all nodes of a step, and not by those that were right, so that the tree takes slots of
rejected guesses for tokens of the answer. Nothing fails; whoever asks next and hits them attends to words that nobody has said.
"""

from collections.abc import Sequence
from itertools import cycle, takewhile

import numpy as np

from ch07_sglang_radix.request import Req
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.distributed.launch import run_main
from common.models.drafters.contract import DraftOptions
from common.sampling.params import SamplingParams
from common.teaching.show import check, heading, mistake, table

QUESTION, OUT, PAGE_SIZE, NODES, POOL = "What is a radix cache?", 24, 4, 6, 256
RIGHT = (5, 0, 2, 1, 3)  # guesses of a step that are right
WRONG_TOKEN = 7
LATER = 8  # tokens of whoever asks next


class KnowsTheAnswer:
    """Guesses a chain whose first tokens are right, as many as RIGHT says, and the others wrong."""

    def __init__(self, answer: Sequence[int]):
        self.answer, self._right = answer, cycle(RIGHT)

    def guess(self, reqs: Sequence[Req], nodes: int) -> tuple[np.ndarray, np.ndarray]:
        (req,) = reqs
        right = self.answer[len(req.output_ids) :][: min(next(self._right), nodes - 1)]
        tokens = np.full((1, nodes - 1), WRONG_TOKEN, dtype=np.int64)
        tokens[0, : len(right)] = right
        return tokens, np.arange(nodes - 1)[None]


def engine(guesses: bool) -> TPScheduler:
    options = DraftOptions("BY HAND", None, NODES - 1, 1, NODES) if guesses else None
    wrapper = TPRadixAttentionModelWrapper(
        device="cpu", page_size=PAGE_SIZE, max_total_tokens=POOL, speculative=options
    )
    return TPScheduler(wrapper, overlap=False, check=True)


def ask(scheduler: TPScheduler, ids: Sequence[int], out: int = OUT) -> Req:
    scheduler.add_request(
        input_ids=ids, sampling_params=SamplingParams(max_new_tokens=out, ignore_eos=True, logprobs=True)
    )
    return scheduler.waiting[-1]


def main() -> None:
    plain, guessing = engine(False), engine(True)
    ids = plain.wrapper.tokenizer.encode(QUESTION)
    wanted = ask(plain, ids)
    plain.process_requests()
    guessing.speculation.guesser = KnowsTheAnswer(wanted.output_ids)

    heading(f"{QUESTION!r}: {len(ids)} tokens, pages of {PAGE_SIZE}, {NODES} nodes a verify step")
    req = ask(guessing, ids)
    one_by_one(guessing, req)
    check("the answer is that of plain decoding", req.output_ids == wanted.output_ids)

    heading("After the end")
    rows = [
        (name, s.steps["decode"], s.tree.evictable_size, s.pool.num_free_pages, s.tree.evictable_size + s.pool.free_slots)
        for name, s in (("plain", plain), ("guessing", guessing))
    ]  # fmt: skip
    table(("", "decode steps", "slots in the tree", "free pages", "slots of both"), rows)
    same = plain.tree.pretty() == guessing.tree.pretty()
    check("both trees hold the same tokens", same)
    check("and no page is lost", all(row[-1] == POOL for row in rows))
    the_mistake(ids, wanted.output_ids)


def one_by_one(scheduler: TPScheduler, req: Req) -> None:
    """Its steps, and the slots of one of them."""
    rows, told, shown = [], scheduler.speculation, 0
    while not req.ended:
        length, tokens, correct, verified = req.kv_len, len(req.output_ids), told.correct, told.steps
        scheduler.step()
        kind, right = ("verify", told.correct - correct) if told.steps > verified else ("prefill", "")
        if right == RIGHT[2]:
            shown = shown or length
        now = (req.kv_len, "" if req.ended else req.allocated_len, scheduler.pool.num_free_pages)
        rows.append((kind, right, len(req.output_ids) - tokens, length, *now))
    table(("step", "right", "tokens", "length before", "after", "slots of its row", "free pages"), rows)
    print(f"\n  The step that began at length {shown}: {RIGHT[2]} of its guesses were right")
    nodes = ["last token", *["right"] * RIGHT[2], *["rejected"] * (NODES - 1 - RIGHT[2])]
    fate = ["counts" if node != "rejected" else "behind the end: the next step writes here" for node in nodes]
    table(
        ("place", "node", "", "afterwards"),
        list(zip(range(shown, shown + NODES), range(NODES), nodes, fate, strict=True)),
    )


def the_mistake(ids: Sequence[int], answer: Sequence[int]) -> None:
    """A step is verified of which no guess is right; its slots are put into the tree as if they were the answer's."""
    heading("A length that moves on by all nodes")
    follow_up = [*ids, *answer[: NODES + 6]]
    said = {}
    for name, count in (("by all nodes", NODES), ("by what was right", 1)):
        scheduler = engine(True)
        scheduler.after_step.clear()  # the check would say that pages have two owners
        scheduler.speculation.guesser = KnowsTheAnswer([])  # nothing is right
        first = ask(scheduler, ids)
        while not scheduler.speculation.steps:
            scheduler.step()
        length = len(ids) + count  # prompt and root: one token is right for certain
        known = np.array(follow_up[:length])
        scheduler.tree.insert(known, scheduler.req_to_token.req_to_token[first.row, :length].copy())
        scheduler.running.clear()
        second = ask(scheduler, follow_up, LATER)
        scheduler.process_requests()
        said[name] = second
    fresh = engine(False)
    right = ask(fresh, follow_up, LATER)
    fresh.process_requests()
    said["nothing is cached"] = right
    print(f"  Another request begins with the question and {NODES + 6} tokens of its answer")
    rows = [
        (name, req.cached_tokens, f"{off(req, right):.2f}", repr(fresh.wrapper.tokenizer.decode(req.output_ids)))
        for name, req in said.items()
    ]
    table(("the length has moved on", "cached", "log-probabilities off by", "it says"), rows)
    by_all, by_right = (off(said[name], right) for name in list(said)[:2])
    mistake("log-probabilities of what it says, off by at most", f"{by_all:.2f}", f"{by_right:.2f}")
    check("the right length changes nothing", by_right < 1e-3 < by_all)


def off(req: Req, right: Req) -> float:
    """How far its log-probabilities are from the right ones, as long as both say the same."""
    pairs = zip(req.answer.logprobs, right.answer.logprobs, strict=True)
    return max(abs(a.logprob - b.logprob) for a, b in takewhile(lambda pair: pair[0].token == pair[1].token, pairs))


if __name__ == "__main__":
    run_main(main)
