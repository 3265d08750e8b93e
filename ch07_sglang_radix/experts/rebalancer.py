"""Hot experts at run time: read what the experts had to do, find a better place for each, move weights between two steps.

    rank 0                                    every other rank
    after every n-th step: settle             (follows)
    note "rebalance_experts"     ->           rebalance_experts
      rows of every slot       <- gather ->     rows of every slot         Executor.expert_load
      place (eplb.py)
      placement                -> broadcast     placement
      weights                  <- messages ->   weights                    Executor.move_experts
    the next step is computed with experts in other places: the same numbers, by others

One will: rank 0 alone decides where an expert lies, and all ranks have the same table before any weight moves. In SGLang every rank
works the placement out by itself (0.5.23, srt/eplb/eplb_manager.py). Requests go on where they were: pages, tree and tokens know
nothing of experts. Steps that are on their way are taken back first, so no step is computed with two placements.

A layer stays as it is unless the new placement would have been better for the rows that were counted: moving costs messages, and
greedy packing is no promise.
"""

import logging
from functools import partial

import torch

from ch07_sglang_radix.expert_load import ExpertLoad
from ch07_sglang_radix.experts.eplb import arranged, balancedness, place, rank_loads
from ch07_sglang_radix.scheduler import TPScheduler
from common.parallel_state import broadcast

log = logging.getLogger(__name__)

READ, REBALANCE = "expert_load", "rebalance_experts"  # notes


class Rebalancer:
    """On every rank of an engine; rank 0's counts steps, and tells the others.

    every: rebalance after so many steps, None: never. reads: ask for the load after each step. says: write each reading to the
    log. nodes: hosts over which the ranks of a stage are spread evenly. Raises ValueError, on every rank alike, for a model
    without experts, or with such as cannot move.
    """

    def __init__(
        self, scheduler: TPScheduler, every: int | None = None, reads: bool = False, says: bool = False, nodes: int = 1
    ):
        wrapper = scheduler.wrapper
        mixture = wrapper.config.mixture
        if mixture is None:
            raise ValueError(
                f"enable_eplb and expert_balancedness_report_mode are about experts, and {wrapper.config.architecture} has none; "
                "leave them out"
            )
        if every is not None:
            wrapper.refuse_experts_of_codes("enable_eplb")
        ranks = len(wrapper.placement.shares)
        self._scheduler, self._every, self._reads, self._says = scheduler, every, reads, says
        self._executor, self._placement = wrapper, wrapper.placement
        self._layers = [layer for layer, sparse in enumerate(mixture.sparse) if sparse]
        self._place = partial(
            place,
            rooms=[stop - first for first, stop in self._placement.shares],
            groups=mixture.router.groups,
            nodes=nodes if ranks % nodes == 0 else 1,
        )
        control = scheduler.control
        control.notes |= {READ: self._read, REBALANCE: self._rebalance}
        self._seen = wrapper.expert_load()  # rows [L, P] at the last reading; what was before is nobody's
        self._window = torch.zeros(len(self._layers), mixture.num_experts)  # rows since the last rebalancing
        self._next = every
        self.load: ExpertLoad | None = None
        if scheduler.replica.rank == 0:
            self.load = scheduler.expert_load = ExpertLoad(self._layers, mixture.num_experts, ranks)
            scheduler.after_step.insert(0, self.after_step)  # the check and the trace see what it did

    def after_step(self) -> None:
        """Rank 0, after each step."""
        control, done = self._scheduler.control, self._scheduler.step_number
        if self._next is not None and done >= self._next:
            self._next = done + self._every
            self._scheduler.settle_all()
            control.together(REBALANCE)
        elif self._reads:
            control.together(READ)

    # --- on every rank, between two steps

    def _read(self) -> None:
        """All ranks tell what their slots had to do; rank 0 adds it up."""
        counts = self._executor.expert_load()  # [L, P]
        if self.load is None:
            return
        new, self._seen = counts - self._seen, counts
        new, logical = new[self._layers], self._placement.physical_to_logical[self._layers]
        of_expert = torch.zeros(self._window.shape, dtype=torch.int64).scatter_add_(1, logical, new)
        of_rank = torch.stack([new[:, first:stop].sum(1) for first, stop in self._placement.shares], 1)
        self._window += of_expert
        self.load.add(of_expert.numpy(), of_rank.numpy())
        if self._says:
            log.info(
                "[Expert Balancedness] step=%d balancedness=%.3f", self._scheduler.step_number, self.load.balancedness
            )

    def _rebalance(self) -> None:
        self._read()
        replica, before = self._scheduler.replica, self._placement.physical_to_logical
        after = self._better() if self.load else torch.empty_like(before)
        if replica.size > 1:
            broadcast(after, replica, "placement")  # COMM broadcast [L, P]: which expert each place holds from now on
        moved = int((after != before).sum())
        if moved:
            self._executor.move_experts(after)
            self._seen = torch.zeros_like(after)
        if self.load:
            self._window.zero_()
            self.load.rebalanced += 1
            self.load.moved += moved
            slots, step = len(self._layers) * after.shape[1], self._scheduler.step_number
            log.info("step %d: experts placed anew, %d of %d slots change", step, moved, slots)

    def _better(self) -> torch.Tensor:
        """[L, P]: of each layer the placement that suits the rows since the last rebalancing, or the one it has."""
        placement = self._placement.physical_to_logical.clone()
        for layer, rows in zip(self._layers, self._window.tolist(), strict=True):
            experts = placement[layer].tolist()
            before = [experts[first:stop] for first, stop in self._placement.shares]
            after = self._place(rows)
            if balancedness(rank_loads(rows, after)) > balancedness(rank_loads(rows, before)):
                placement[layer] = torch.tensor([one for held in arranged(after, before) for one in held])
        return placement
