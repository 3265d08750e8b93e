"""What rank 0 knows: the queue, who runs, the tree, the pools, and what has been counted so far.

The scheduler (scheduler.py) is the loop over this state; who may enter, what a step is made of and how room is made
(admission.py, step_tasks.py, retraction.py) read and move it; the trace and the invariants only read it. On the other
ranks the counts alone are filled, from what rank 0 shares at the end.
"""

from collections.abc import Callable, Iterator

import numpy as np

from ch07_sglang_radix.control_plane import ControlPlane
from ch07_sglang_radix.eviction import pick_strategy
from ch07_sglang_radix.memory_pool import ReqToTokenPool, TokenToKVPool
from ch07_sglang_radix.policy_names import check_policy
from ch07_sglang_radix.radix_cache import RadixCache
from ch07_sglang_radix.request import Req, RequestOutput
from ch07_sglang_radix.request_memory import RequestMemory
from ch07_sglang_radix.schedule_batch import ScheduleBatch
from ch07_sglang_radix.schedule_policy import SchedulePolicy
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper

INIT_NEW_TOKEN_RATIO = 0.7  # share of its worst case that a running request is expected to need; SGLang's

# (who it is, [pages it owns]) of each owner of pages
Owners = Iterator[tuple[str, np.ndarray]]


class SchedulerState:
    """Grouped by who moves it. The arguments are those of TPScheduler.

    Raises ValueError, on every rank alike, for a schedule or an eviction policy that is not there.
    """

    def __init__(
        self, wrapper: TPRadixAttentionModelWrapper, *, schedule_policy: str = "fcfs", disable_radix_cache: bool = False,
        radix_eviction_policy: str = "lru", radix_bigram: bool = False, seed: int = 0,
        schedule_conservativeness: float = 1.0,
    ):  # fmt: skip
        # rank 0 alone uses them, and all refuse them: whoever went on would wait for a rank that has left
        check_policy(schedule_policy, disable_radix_cache)
        pick_strategy(radix_eviction_policy)
        self.wrapper, self.tp, self.page_size, self.seed = wrapper, wrapper.tp, wrapper.page_size, seed
        self.control = ControlPlane(wrapper)

        # counts
        self.steps = {"prefill": 0, "decode": 0}
        self.work = {"tokens": 0, "samplings": 0, "sampled": 0}  # rows fed in; steps that sampled; tokens they gave
        self.retractions = self.num_finished = self.num_requests = 0
        self.served = {"prompt": 0, "cached": 0}  # tokens of the prompts admitted so far, and how many were in the tree

        # what has come out
        self.results: dict[int, RequestOutput] = {}
        self.grown: dict[int, Req] = {}  # who got a token since somebody has emptied this

        self.last_prefill: list[tuple[Req, int]] = []  # the newest prefill: who, and how many tokens computed
        if self.tp.rank > 0:
            return  # rank 0 alone has a queue, a tree and pools

        # pages and rows
        self.pool = TokenToKVPool(wrapper.kv_cache)
        self.req_to_token = ReqToTokenPool(wrapper.max_running_requests, wrapper.max_context + self.page_size)
        self.tree = RadixCache(self.pool, self.req_to_token, disable_radix_cache, radix_eviction_policy, radix_bigram)
        self.memory = RequestMemory(self.pool, self.req_to_token, self.tree)
        self.more_owners: list[Callable[[], Owners]] = []  # of pages, besides the free list, the requests and the tree

        # admission
        self.policy = SchedulePolicy(schedule_policy, self.tree, seed)
        self.waiting: list[Req] = []
        self.chunked: Req | None = None  # the one request whose prompt is computed in part
        self.init_new_token_ratio = min(INIT_NEW_TOKEN_RATIO * schedule_conservativeness, 1.0)
        self.new_token_ratio = self.init_new_token_ratio
        self.resumed: Req | None = None  # whose prompt the newest prefill step goes on with
        self.held: dict[int, str] = {}  # who was asked for the newest prefill step and did not get in: Answer's words

        # decoding
        self.running: list[Req] = []
        self.batch = self.empty_batch()  # of the newest decode step

    def empty_batch(self) -> ScheduleBatch:
        return ScheduleBatch(self.memory, bool(self.wrapper.table.tile_members))

    @property
    def admitted(self) -> list[Req]:
        """Who holds a row and pages."""
        return self.running + ([self.chunked] if self.chunked else [])

    @property
    def unfinished(self) -> list[Req]:
        """Everybody who waits or runs."""
        return [*self.waiting, *([self.chunked] if self.chunked else []), *self.running]

    @property
    def decoding(self) -> list[Req]:
        """The requests of the newest decode step."""
        return self.batch.reqs

    @property
    def step_number(self) -> int:
        return self.steps["prefill"] + self.steps["decode"]

    @property
    def held_slots(self) -> int:
        """Slots that are neither free nor in the tree, counted at those who hold them and not by subtraction."""
        requests = sum(req.allocated_len - req.prefix_len for req in self.admitted)
        others = sum(len(pages) for more in self.more_owners for _, pages in more())
        return requests + others * self.page_size

    def owners(self) -> Owners:
        """Everybody who owns pages; a page has one owner, and none has no owner (invariants.py)."""
        rows = self.req_to_token.req_to_token
        yield "the free list", self.pool.free_pages()
        for req in self.admitted:
            yield (
                f"request {req.rid}",
                rows[req.row, req.prefix_len : req.allocated_len : self.page_size] // self.page_size,
            )
        for node in self.tree.nodes():
            yield f"node {node.key[:4].tolist()}...", node.value[:: self.page_size] // self.page_size
        for more in self.more_owners:
            yield from more()
