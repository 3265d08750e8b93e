"""Which expert lies where, and which of its copies a token is sent to.

A mixture has E *logical* experts: those that a router chooses. The ranks hold P = E + redundant *physical* ones, an expert
that many tokens choose perhaps twice. Physical expert p lies with ep rank r if r*P//ep <= p < (r+1)*P//ep; so P need not
divide: shares differ by one, every rank has as many slots as the largest share, and a slot that nothing lies in is zero and
never chosen.

    E = 5, redundant = 1, ep = 2      slots 3
    physical              0  1  2 | 3  4  5
    logical               0  1  2 | 3  4  0        by default p % E; a balancer finds a better one (`place`)
    place = rank * 3 + slot

With ep < tp, an expert's columns are cut over the moe_tp ranks that share an ep rank. The tables are changed in place: a CUDA
graph that has been captured with them goes on with the new ones.

Which copy, if there are several? It is decided for (source, expert), where the source is the ep rank that a row comes from,
or where every rank has all rows, row % ep; all ranks must come to the same.

    static    one that the source holds itself, else the copies are dealt out over the sources
    dynamic   the copies take turns, row by row

SGLang 0.5.23: srt/eplb/expert_location.py (ExpertLocationMetadata), srt/eplb/expert_location_dispatch.py; its dynamic choice
goes by the row, too, where all ranks see the same ones, and is drawn at random where rows travel.
"""

from typing import NamedTuple

import torch

from common.distributed.collectives import CPU, TPGroup
from common.distributed.layout import EP_ALGORITHMS


class Share(NamedTuple):
    """Physical experts of one ep rank: first .. stop-1."""

    first: int
    stop: int


def shares(physical: int, ep: int) -> list[Share]:
    """Of each rank; they differ by one at most.

    >>> shares(5, 2)
    [Share(first=0, stop=2), Share(first=2, stop=5)]
    """
    ends = [rank * physical // ep for rank in range(ep + 1)]
    return [Share(*ends[rank : rank + 2]) for rank in range(ep)]


def refuse_ranks_without(num_experts: int, ep: int) -> None:
    """Raises ValueError for ranks that would have no expert."""
    if ep > num_experts:
        raise ValueError(
            f"ep_size={ep} ranks for {num_experts} experts: some would have none; use ep_size={num_experts} or less"
        )


class ExpertPlacement:
    """Of all layers of a model, on one rank.

    ep, moe_tp: this rank's groups. physical_to_logical [L, P] stays on the CPU, equal on all ranks; the other tables are on
    `device`. load [L, S]: rows that this rank has computed in each of its slots; added to while the model runs.
    Raises ValueError for more ranks than experts, and for an algorithm that there is not.
    """

    def __init__(
        self, num_layers: int, num_experts: int, ep: TPGroup | None = None, moe_tp: TPGroup | None = None, redundant: int = 0,
        algorithm: str = "static", device: torch.device | str = "cpu",
    ):  # fmt: skip
        self.ep, self.moe_tp = ep or TPGroup(), moe_tp or TPGroup()
        if algorithm not in EP_ALGORITHMS:
            raise ValueError(f"ep_dispatch_algorithm={algorithm!r} is unknown; use {' or '.join(EP_ALGORITHMS)}")
        refuse_ranks_without(num_experts, self.ep.size)
        self.num_experts, self.redundant, self.algorithm = num_experts, redundant, algorithm
        self.num_physical = num_experts + redundant
        self.shares = shares(self.num_physical, self.ep.size)
        self.slots = max(stop - first for first, stop in self.shares)
        place_of = [
            rank * self.slots + slot for rank, (first, stop) in enumerate(self.shares) for slot in range(stop - first)
        ]
        self._place_of = place_of  # [P]
        self.whole = self.ep.size == 1 and not redundant  # every expert lies here, once, in the slot of its number
        # a GPU without expert parallelism has nothing to balance, and saves two launches a layer
        self.counts = not self.whole or torch.device(device).type == "cpu"
        self.physical_to_logical = torch.zeros(num_layers, self.num_physical, dtype=torch.int64, device=CPU)
        new = torch.zeros(num_layers, num_experts, redundant + 1, dtype=torch.int64, device=device)
        self.copies = new  # [L, E, redundant + 1]: places, the first `count` of them valid
        self.count = new.new_ones(num_layers, num_experts)
        self.nearest = new.new_zeros(num_layers, self.ep.size, num_experts)  # place for a source
        self.load = new.new_zeros(num_layers, self.slots)
        self.place(torch.arange(self.num_physical, device=CPU).remainder(num_experts).expand(num_layers, -1))

    def place(self, physical_to_logical: torch.Tensor) -> None:
        """physical_to_logical [L, P], in place. Weights do not move here. Raises ValueError for what is no placement."""
        new = physical_to_logical.cpu()
        self.refuse_a_misfit(new)
        self.physical_to_logical.copy_(new)
        copies, count, nearest = (table.cpu() for table in (self.copies, self.count, self.nearest))
        done: dict[tuple[int, ...], int] = {}
        for layer, row in enumerate(map(tuple, new.tolist())):
            if row in done:  # by default all layers are alike
                same = done[row]
                copies[layer], count[layer], nearest[layer] = copies[same], count[same], nearest[same]
                continue
            done[row] = layer
            places: list[list[int]] = [[] for _ in range(self.num_experts)]
            for physical, logical in enumerate(row):
                places[logical].append(self._place_of[physical])
            filled = [here + [0] * (self.redundant + 1 - len(here)) for here in places]
            copies[layer] = torch.tensor(filled, device=CPU)
            count[layer] = torch.tensor([len(here) for here in places], device=CPU)
            nearest[layer] = torch.tensor([self._dealt_out(here) for here in places], device=CPU).t()
        for table, values in ((self.copies, copies), (self.count, count), (self.nearest, nearest)):
            table.copy_(values)

    def refuse_a_misfit(self, physical_to_logical: torch.Tensor) -> None:
        """A shape other than [L, P], an expert that would lie nowhere, or that there is not."""
        want = tuple(self.physical_to_logical.shape)
        if tuple(physical_to_logical.shape) != want:
            raise ValueError(
                f"a placement {list(physical_to_logical.shape)} is not [layers, physical experts] = {list(want)}"
            )
        every = torch.arange(self.num_experts, device=CPU)
        for layer, row in enumerate(physical_to_logical):
            found = row.unique()
            if not torch.equal(found, every):
                odd = sorted(set(every.tolist()) ^ set(found.tolist()))[0]
                raise ValueError(
                    f"layer {layer}: expert {odd} of {self.num_experts} "
                    f"{'lies nowhere' if odd in range(self.num_experts) else 'is none'}; place each at least once"
                )

    def held(self, layer: int, ep_rank: int | None = None) -> list[int | None]:
        """The logical expert in each slot of an ep rank, by default this one; None: nothing lies there."""
        return self.held_by(self.physical_to_logical[layer], self.ep.rank if ep_rank is None else ep_rank)

    def held_by(self, row: torch.Tensor, ep_rank: int) -> list[int | None]:
        """The same of any placement of a layer, row [P]."""
        first, stop = self.shares[ep_rank]
        return row[first:stop].tolist() + [None] * (self.slots - (stop - first))

    def locate(self, layer: int, experts: torch.Tensor, source: int | None = None) -> torch.Tensor:
        """experts [T, k] logical -> their places [T, k]. source: the ep rank whose rows they are; None: all ranks have them."""
        rows = torch.arange(len(experts), device=experts.device)
        if self.algorithm == "dynamic" and self.redundant:
            turn = rows.unsqueeze(1) + (source or 0)
            return self.copies[layer][experts, turn.remainder(self.count[layer][experts])]
        if source is None and self.redundant:
            return self.nearest[layer][rows.remainder(self.ep.size).unsqueeze(1), experts]
        return self.nearest[layer, source or 0][experts]

    def here(self, layer: int, experts: torch.Tensor) -> torch.Tensor:
        """experts [T, k] of rows that every rank has -> this rank's slots for them [T, k], -1 for what others compute, and for
        what nobody does: the -1 of a row of padding."""
        if self.whole:
            return experts
        return self.local(self.locate(layer, experts)).where(experts >= 0, -1)

    def local(self, places: torch.Tensor) -> torch.Tensor:
        """places [T, k] -> this rank's slots [T, k], -1 for what others hold."""
        first = self.ep.rank * self.slots
        return (places - first).where((places >= first) & (places < first + self.slots), -1)

    def note(self, layer: int, local: torch.Tensor, live: torch.Tensor | None = None) -> None:
        """Count the rows [T, k] of each slot; live [T]: which rows are real. Nobody waits for it."""
        if not self.counts:
            return
        here = local >= 0
        if live is not None:
            here &= live.unsqueeze(1)
        self.load[layer].index_add_(0, local.clamp(min=0).flatten(), here.flatten().to(self.load.dtype))

    def _dealt_out(self, places: list[int]) -> list[int]:
        """For each source one of an expert's places: its own, else the one that fewest sources have so far."""
        chosen: list[int | None] = [None] * self.ep.size
        used = dict.fromkeys(places, 0)
        for place in places:
            rank = place // self.slots
            if chosen[rank] is None:
                chosen[rank] = place
                used[place] += 1
        for source, own in enumerate(chosen):
            if own is None:
                chosen[source] = least = min(places, key=lambda place: used[place])
                used[least] += 1
        return chosen
