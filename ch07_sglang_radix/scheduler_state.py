"""What rank 0 knows: the queue, who runs, the tree, the pools, and what has been counted so far.

The scheduler (scheduler.py) is the loop over this state; who may enter, what a step is made of and how room is made
(admission.py, step_tasks.py, retraction.py) read and move it; the trace and the invariants only read it. On the other
ranks the counts alone are filled, from what rank 0 shares at the end.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from ch07_sglang_radix.control_plane import ControlPlane
from ch07_sglang_radix.eviction import pick_strategy
from ch07_sglang_radix.expert_load import ExpertLoad
from ch07_sglang_radix.lora import LoRABook
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

    front: where it is counted, and where results come out: the first of several data ranks (data_rank.py), or this state itself.
    number: of this data rank. tree: what prefixes are kept in, the class; one with more tiers has more to it (quantization/).

    Raises ValueError, on every rank alike, for a schedule or an eviction policy that is not there.
    """

    def __init__(
        self, wrapper: TPRadixAttentionModelWrapper, *, schedule_policy: str = "fcfs", disable_radix_cache: bool = False,
        radix_eviction_policy: str = "lru", radix_bigram: bool = False, seed: int = 0,
        schedule_conservativeness: float = 1.0, num_lanes: int | None = None, max_lane_size: int | None = None,
        front: "SchedulerState | None" = None, number: int = 0, tree: type[RadixCache] | None = None,
    ):  # fmt: skip
        # rank 0 alone uses them, and all refuse them: whoever went on would wait for a rank that has left
        check_policy(schedule_policy, disable_radix_cache)
        pick_strategy(radix_eviction_policy)
        parallel = wrapper.parallel
        num_lanes = parallel.pp.size if num_lanes is None else num_lanes
        if num_lanes > 1 and parallel.pp.size == 1 and parallel.replica.size > 1:
            raise ValueError(f"num_lanes={num_lanes} for one stage of {parallel.tp.size} ranks; lanes need pp_size > 1")
        self.wrapper, self.page_size, self.seed = wrapper, wrapper.page_size, seed
        self.tp, self.replica = wrapper.tp, parallel.replica  # rank 0 of the replica is the will
        self.front, self.number = front or self, number
        if front is None:
            self.control = ControlPlane(wrapper)
            wrapper.set_steps_in_flight(num_lanes)

        # counts, but for retractions of the front alone
        self.steps = {"prefill": 0, "decode": 0}
        # rows computed, and those of them that are no padding; steps that sampled; tokens they gave
        self.work = {"tokens": 0, "inputs": 0, "samplings": 0, "sampled": 0}
        self.retractions = self.num_finished = self.num_requests = 0
        self.expert_load: ExpertLoad | None = None  # of rank 0, if somebody reads it (experts/rebalancer.py)
        self.lora: LoRABook | None = None  # of the front, if there are adapters (adapters/control.py)
        self.tiers: Any = (
            None  # of rank 0, if the tree has lower tiers: whoever tells of them (quantization/hicache.py)
        )
        self.served = {"prompt": 0, "cached": 0}  # tokens of the prompts admitted so far, and how many were in the tree

        # what others have set, of the front alone, on every rank
        self.paused = False  # no step runs (TPScheduler.pause)
        self.weights_held = False  # nor while new weights wait to be written (adapters/weight_updater.py)
        self.weight_version = "default"  # of the weights that compute (adapters/weight_updater.py)

        # what has come out, of the front alone
        self.results: dict[int, RequestOutput] = {}
        self.grown: dict[int, Req] = {}  # who got a token since somebody has emptied this

        self.last_prefill: list[tuple[Req, int]] = []  # the newest prefill: who, and how many tokens computed
        if self.replica.rank > 0:
            return  # rank 0 alone has a queue, a tree and pools

        # pages and rows
        self.pool = TokenToKVPool(wrapper.num_pages, wrapper.page_size)
        nodes = wrapper.verifier.options.nodes if wrapper.verifier else 0
        self.req_to_token = ReqToTokenPool(wrapper.max_running_requests, wrapper.max_context + nodes + self.page_size)
        self.tree = (tree or RadixCache)(
            self.pool, self.req_to_token, disable_radix_cache, radix_eviction_policy, radix_bigram
        )
        self.memory = RequestMemory(self.pool, self.req_to_token, self.tree)
        # of pages, besides the free list, the requests and the tree
        self.more_owners: list[Callable[[], Owners]] = [self.memory.sessions.owners]
        # of locks in the tree, besides the requests: who has a `last_node`
        self.more_users: list[Callable[[], Iterable[Any]]] = [self.memory.sessions.slots.values]

        # admission
        self.policy = SchedulePolicy(schedule_policy, self.tree, seed)
        self.waiting: list[Req] = []
        self.elsewhere: list[
            Req
        ] = []  # whom a wing has taken out of the queue, and brings back to it or to those that run
        self.chunked: Req | None = None  # the one request whose prompt is computed in part
        self.init_new_token_ratio = min(INIT_NEW_TOKEN_RATIO * schedule_conservativeness, 1.0)
        self.new_token_ratio = self.init_new_token_ratio
        self.resumed: Req | None = None  # whose prompt the newest prefill step goes on with
        self.held: dict[int, str] = {}  # who was asked for the newest prefill step and did not get in: Answer's words

        # decoding
        self.running: list[Req] = []
        self.num_lanes = num_lanes  # micro-batches that are on their way at once
        self.lane = 0  # whose turn it is
        self.max_lane_size = max_lane_size
        self.batches = [self.empty_batch() for _ in range(num_lanes)]  # of each lane's newest decode step

    @property
    def batch(self) -> ScheduleBatch:
        """Of the lane's newest decode step."""
        return self.batches[self.lane]

    @property
    def in_lane(self) -> list[Req]:
        """Who runs in the lane whose turn it is."""
        return self.running if self.num_lanes == 1 else [req for req in self.running if req.lane == self.lane]

    def room_in_lane(self) -> int | None:
        """How many more may begin to run in this lane, so that all lanes get their share; None: there is only one."""
        if self.num_lanes == 1:
            return None
        share = -(-len(self.unfinished) // self.num_lanes)
        return max(min(share, self.max_lane_size or share) - len(self.in_lane), 0)

    def even_out_lanes(self) -> None:
        """Whoever is too many in this lane, none of whose steps is on its way, goes to the lane with the fewest."""
        share = -(-len(self.running) // self.num_lanes)
        too_many = self.in_lane[share:]
        if too_many:  # perhaps they come back before this lane decodes again, and will have moved on
            self.batches[self.lane] = self.empty_batch()
        for req in too_many:
            sizes = Counter(one.lane for one in self.running)
            req.lane = min(range(self.num_lanes), key=lambda lane: sizes[lane])

    def forget_batches(self) -> None:
        """The running requests have changed in a way that no batch can follow."""
        self.batches = [self.empty_batch() for _ in self.batches]

    def empty_batch(self) -> ScheduleBatch:
        return ScheduleBatch(self.memory, bool(self.wrapper.table.tile_members))

    @property
    def admitted(self) -> list[Req]:
        """Who holds a row and pages."""
        return self.running + ([self.chunked] if self.chunked else [])

    @property
    def unfinished(self) -> list[Req]:
        """Everybody who waits or runs."""
        return [*self.waiting, *self.elsewhere, *([self.chunked] if self.chunked else []), *self.running]

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
