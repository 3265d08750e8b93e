"""How the rows of tokens reach the experts that they chose, where rows and experts are both spread over ranks.

If every rank has all rows, nothing needs to travel: each computes its own experts for all rows, and the sum over ranks,
which ends the layer in any case, adds up what they found ("replicated"). An all-to-all would bring every rank rows that it
has already.

With rows spread (DP attention, sequence parallelism) it is the other way round. Gathering all rows for every rank moves T rows
to each of R ranks and sums as many back. But a row is wanted by k experts only; so it is sent to the ranks of these alone, and
their outputs come home ("all_to_all"):

    counts   [R, S]        how many rows each rank will get for each of its S slots
    rows     [n, D]        a row for each choice, sorted by rank and slot: so the counts say whom it is for, and no ids travel
    home     [n, D]        the outputs, the same way back; here they are weighted and added, in ascending order of the experts

A rank without tokens takes part with counts of zero: its experts may be wanted all the same. Rows of padding stay at home.

    exact    for prefill: as many rows as there are. The CPU waits for the counts, so no CUDA graph can hold it
    fixed    for decode: room for M rows for every slot of every rank, and counts that say how many are real. All shapes are
             known before, so it can be captured; what it costs is R * S * M rows on the wire, however few are real

DeepEP calls the two "normal" and "low-latency" (SGLang's --deepep-mode auto takes them for prefill and decode, as here); its
low-latency kernels write the real rows alone into the fixed buffers of their receivers. SGLang 0.5.23:
srt/layers/moe/token_dispatcher/deepep.py.

An expert whose columns are cut over moe_tp ranks gets its rows on all of them, and home comes a partial sum from each.
"""

from collections.abc import Callable

import torch

from common.distributed.collectives import TPGroup, all_to_all, start_all_to_all
from common.layers.expert_placement import ExpertPlacement


class Travelling:
    """Rows on their way to one layer's experts, and back: made by `set_out` or `set_out_fixed`.

    received() waits for what others have sent: (x [n, D], slots [n], -1 where there is no row). home(y [n, D]) -> this rank's
    choices [T, k, D].
    """

    def __init__(self, received: Callable, home: Callable):
        self.received, self.home = received, home


def set_out(x: torch.Tensor, places: torch.Tensor, placement: ExpertPlacement, tp: TPGroup, name: str) -> Travelling:
    """x [T, D], places [T, k] (ExpertPlacement.locate), real rows only. The CPU waits for the counts, not for the rows."""
    slots, copies, k = placement.slots, placement.moe_tp.size, places.shape[1]
    ordered, order = places.flatten().sort(stable=True)  # by rank and slot
    counts = torch.bincount(ordered, minlength=placement.ep.size * slots).view(-1, slots)  # [ep, S]
    told = counts.repeat_interleave(copies, 0)  # [R, S]
    one = [1] * tp.size
    heard = all_to_all(told, tp, f"{name}.counts", one, one)  # COMM all-to-all [R, S]: rows for each slot
    each, coming = torch.stack((told.sum(1), heard.sum(1))).tolist()
    blocks = (order // k).split(each[::copies])  # the rows for each ep rank
    rows = x[torch.cat([block for block in blocks for _ in range(copies)])]
    wait = start_all_to_all(rows, tp, f"{name}.dispatch", each, coming)  # COMM all-to-all [n, D]: a row for each choice

    def received() -> tuple[torch.Tensor, torch.Tensor]:
        numbers = torch.arange(slots, device=x.device).repeat(tp.size)
        return wait(), numbers.repeat_interleave(heard.flatten(), output_size=sum(coming))

    def home(y: torch.Tensor) -> torch.Tensor:
        y = all_to_all(y, tp, f"{name}.combine", coming, each)  # COMM all-to-all [n, D]: the outputs, the way back
        if copies > 1:  # of each block a partial sum from each of its ranks
            blocks = y.split([copies * n for n in each[::copies]])
            y = torch.cat([block.unflatten(0, (copies, -1)).sum(0) for block in blocks])
        return torch.empty_like(y).index_copy_(0, order, y).unflatten(0, (len(x), k))

    return Travelling(received, home)


def set_out_fixed(
    x: torch.Tensor, places: torch.Tensor, live: torch.Tensor | None, placement: ExpertPlacement, tp: TPGroup, name: str
) -> Travelling:  # fmt: skip
    """The same with shapes that depend on those of x [M, D] alone, and no word from the CPU. live [M]: which rows are real."""
    slots, copies, (most, k) = placement.slots, placement.moe_tp.size, places.shape
    if live is not None:
        places = places.where(live.unsqueeze(1), -1)
    places = places.flatten()
    rooms = placement.ep.size * slots
    wants = places.unsqueeze(1) == torch.arange(rooms, device=x.device)  # [M k, ep S]
    number = (wants.cumsum(0) * wants).sum(1) - 1  # of each choice among those of its place
    at = (places * most + number).where(places >= 0, rooms * most)  # the last row is nobody's
    buffer = x.new_zeros(rooms * most + 1, x.shape[1])
    buffer[at] = x.repeat_interleave(k, 0)
    of_ranks = lambda rooms: rooms.unflatten(0, (-1, slots)).repeat_interleave(copies, 0)  # noqa: E731, [R, S, ...]
    one = [1] * tp.size
    told = of_ranks(wants.sum(0))
    heard = all_to_all(told, tp, f"{name}.counts", one, one)  # COMM all-to-all [R, S]: rows for each slot
    rows = of_ranks(buffer[:-1].unflatten(0, (rooms, most)))
    wait = start_all_to_all(rows, tp, f"{name}.dispatch", one, one)  # COMM all-to-all [R, S, M, D]: room for all

    def received() -> tuple[torch.Tensor, torch.Tensor]:
        numbers = torch.arange(slots, device=x.device).view(1, slots, 1)
        real = torch.arange(most, device=x.device) < heard.unsqueeze(2)  # [R, S, M]
        return wait().flatten(0, 2), numbers.where(real, -1).flatten()

    def home(y: torch.Tensor) -> torch.Tensor:
        y = y.view(tp.size, slots, most, y.shape[-1])
        y = all_to_all(y, tp, f"{name}.combine", one, one)  # COMM all-to-all [R, S, M, D]: the outputs, the way back
        y = y.unflatten(0, (-1, copies)).sum(1) if copies > 1 else y
        y = torch.cat((y.flatten(0, 2), y.new_zeros(1, y.shape[-1])))  # a row of padding comes home as 0
        return y[at].unflatten(0, (most, k))

    return Travelling(received, home)


def add_at_home(y: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """y [T, k, D] of the experts [T, k] -> their weighted sum [T, D], added one by one in ascending order of the experts.

    The order in which one rank alone would have added, whoever computed them: rounding does not tell where experts lie.
    """
    order = experts.argsort(dim=1)
    y = y.gather(1, order.unsqueeze(2).expand_as(y)) * weights.gather(1, order).unsqueeze(2)
    total = y[:, 0]
    for one in y.unbind(1)[1:]:
        total = total + one
    return total
