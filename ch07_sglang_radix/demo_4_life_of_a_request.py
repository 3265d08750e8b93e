"""The life of one request, from the queue back to the tree, in eight steps.

    python ch07_sglang_radix/demo_4_life_of_a_request.py

The real scheduler with the bundled model on one rank. One question has been answered before; now a second one with the
same system prompt comes. Nothing is acted out: the scheduler's own calls are watched, and after each of them the
pools and the tree are printed as they are then.
"""

from collections.abc import Callable

from ch07_sglang_radix.request import Req
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tasks import DecodeTask, encode
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.distributed.launch import run_main
from common.sampling.params import SamplingParams
from common.teaching.show import check, heading
from common.tiny_qwen.phrasings import SYSTEM_PROMPT

PAGE_SIZE, MAX_NEW_TOKENS, SHOWN = 4, 48, 6


def main() -> None:
    wrapper = TPRadixAttentionModelWrapper(device="cpu", page_size=PAGE_SIZE, max_total_tokens=512)
    scheduler = TPScheduler(wrapper, check=True)
    heading("Before: another question has left its prompt and its answer in the tree")
    ask(scheduler, "What is a page?")
    scheduler.process_requests()
    state(scheduler)

    life = Life(scheduler)
    life.watch()
    heading("1. queue: prompt ids and parameters, no memory yet")
    ask(scheduler, "What is a radix cache?")
    req = life.req = scheduler.waiting[0]
    print(f"  request {req.rid}: {len(req.prompt_ids)} prompt tokens, {req.params.max_new_tokens} new at most")
    state(scheduler, req)
    while scheduler.step():
        pass
    text = scheduler.results[req.rid].text
    print(f"\n  {text}")
    check("the eight steps came in this order", life.seen == list(STEPS))
    check("the answer ended with the stop token", req.finish_reason["type"] == "stop")
    free, cached = scheduler.pool.num_free_pages, scheduler.tree.evictable_size // PAGE_SIZE
    check(f"{free} free + {cached} cached = all {scheduler.pool.num_pages} pages, nothing is locked",
          free + cached == scheduler.pool.num_pages and scheduler.tree.protected_size == 0)  # fmt: skip


STEPS = {
    "queue": "prompt ids and parameters, no memory yet",
    "match": "tree.match_prefix, all tokens but the last",
    "lock": "tree.inc_lock_ref, before anything can be evicted",
    "alloc": "a row of req_to_token, and pages for what is not in the tree",
    "prefill": "one task for all ranks, and the first token",
    "cache_unfinished_req": "the prompt's whole pages become the tree's",
    "decode": "a task of 12 words a step, 2 of them for this row; 4 more when it begins a page",
    "cache_finished_req": "prompt and answer stay in the tree, the rest goes back",
}


class Life:
    """Prints what the scheduler does with one request, once a step of its life."""

    def __init__(self, scheduler: TPScheduler):
        self.scheduler, self.tree = scheduler, scheduler.tree
        self.req: Req | None = None
        self.seen = ["queue"]
        self.decode_steps = 0
        self._inside = False  # a watched call inside a watched call is a detail

    def watch(self) -> None:
        self._after(self.tree, "match_prefix", self.match)
        self._after(self.tree, "inc_lock_ref", self.lock)
        self._after(self.scheduler.memory, "grow", self.alloc)
        self._after(self.scheduler.control, "execute", self.execute)
        self._after(self.tree, "cache_unfinished_req", self.cache_unfinished)
        self._after(self.tree, "cache_finished_req", self.cache_finished)

    def _after(self, owner, name: str, tell: Callable) -> None:
        """Let `owner.name(...)` do its work, then tell about it."""
        work = getattr(owner, name)

        def watched(*args):
            outermost, self._inside = not self._inside, True
            result = work(*args)
            if outermost:
                self._inside = False
                tell(result, *args)
            return result

        setattr(owner, name, watched)

    def title(self, step: str) -> None:
        if step not in self.seen:
            self.seen.append(step)
            heading(f"{len(self.seen)}. {step}: {STEPS[step]}")

    def match(self, match, ids, extra_key) -> None:
        self.title("match")
        print(f"  {len(match.slots)} of {len(ids)} tokens are there: {len(match.slots) // PAGE_SIZE} pages")
        state(self.scheduler, self.req)

    def lock(self, _, node) -> None:
        self.title("lock")
        print(f"  lock_ref of the node is {node.lock_ref} now")
        state(self.scheduler, self.req)

    def alloc(self, _, req, length) -> None:
        self.title("alloc")
        print(f"  row {req.row}: pages {pages(self.scheduler, req, 0, req.prefix_len)} from the tree, "
              f"pages {pages(self.scheduler, req, req.prefix_len, req.allocated_len)} new")  # fmt: skip
        state(self.scheduler, req)

    def execute(self, logits, task) -> None:
        if isinstance(task, DecodeTask):
            self.title("decode")
            self.decode_steps += 1
            if self.decode_steps > SHOWN:
                return
            news = "".join(f", page {list(update.pages)} is new" for update in task.updates)
            print(f"  step {task.step}: position {task.positions[0]}, {len(encode(task))} words{news}")
            return
        self.title("prefill")
        sequence = task.sequences[0]
        print(f"  row {sequence.row}: {sequence.cached} tokens are cached, {len(task.token_ids)} new ones are sent")
        print(f"  {len(encode(task))} words; logits {list(logits.shape)} come back, rank 0 samples")

    def cache_unfinished(self, _, req) -> None:
        self.title("cache_unfinished_req")
        print(f"  {req.prefix_len} of {req.kv_len} tokens are the tree's now, {req.kv_len - req.prefix_len} its own")
        state(self.scheduler, req)

    def cache_finished(self, _, req) -> None:
        print(f"  ... and {self.decode_steps - SHOWN} more like these")
        self.title("cache_finished_req")
        kept = req.kv_len // PAGE_SIZE * PAGE_SIZE
        tokens = f"{len(req.prompt_ids)} + {len(req.output_ids)} tokens"
        print(f"  {tokens}; the last was never fed in, so {req.kv_len} have K and V")
        print(f"  {kept} stay as {kept // PAGE_SIZE} whole pages, {req.kv_len - kept} are on a page that goes back")
        state(self.scheduler)


def ask(scheduler: TPScheduler, question: str) -> None:
    messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}]
    ids = scheduler.wrapper.tokenizer.encode_chat(messages)
    scheduler.enqueue(question, ids, SamplingParams(max_new_tokens=MAX_NEW_TOKENS))


def pages(scheduler: TPScheduler, req: Req, start: int, end: int) -> str:
    ids = (scheduler.req_to_token.req_to_token[req.row, start:end:PAGE_SIZE] // PAGE_SIZE).tolist()
    return f"{ids[0]} to {ids[-1]}" if len(ids) > 2 and ids == list(range(ids[0], ids[-1] + 1)) else str(ids)


def state(scheduler: TPScheduler, req: Req | None = None) -> None:
    tree, pool = scheduler.tree, scheduler.pool
    own = (req.allocated_len - req.prefix_len) // PAGE_SIZE if req else 0
    print(f"     pages: {pool.num_free_pages} free, {tree.evictable_size // PAGE_SIZE} evictable, "
          f"{tree.protected_size // PAGE_SIZE} protected, {own} the request's own")  # fmt: skip


if __name__ == "__main__":
    run_main(main)
