"""A way to lay a model out, and the load it is planned for."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch

from common.distributed.layout import EP_DISPATCHES, Layout, get_rank_mapping, layouts
from common.models.config import ModelConfig
from common.quantization.method import Hardware

HOPPER = Hardware("cuda", (9, 0))


@dataclass(frozen=True)
class Load:
    """`batch` requests at once over all replicas, each `context` tokens long when it is longest.

    chunk: prompt tokens of a step. dtype of weights and what is computed, kv_dtype of the pages. hardware: which weights of a
    quantized checkpoint stay codes on it.
    """

    context: int
    batch: int
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype = torch.bfloat16
    page_size: int = 16
    chunk: int = 8192
    hardware: Hardware = HOPPER

    @property
    def pages(self) -> int:
        """Of a request."""
        return -(-self.context // self.page_size)


class Stage(NamedTuple):
    """Consecutive layers; the first stage embeds, the last one has the final norm and the LM head."""

    layers: int
    first: bool
    last: bool
    sparse: int = 0  # of these layers, how many have experts in place of an MLP
    start: int = 0  # the first of them, where a quantized checkpoint's config may speak of each


@dataclass(frozen=True)
class Way:
    """A layout, whether norms and residual are cut over its tp ranks too (sequence parallelism), and how rows come to experts."""

    layout: Layout
    sp: bool = False
    ep_dispatch: str = EP_DISPATCHES[0]

    @property
    def parts(self) -> int:
        """Groups of ranks with rows, and attention, of their own."""
        return self.layout.attn_dp * self.layout.cp

    @property
    def spreads(self) -> bool:
        """Are the rows between attention and MLP cut over ranks? layers/communicator.py."""
        return self.sp or self.parts > 1

    @property
    def travels(self) -> bool:
        """Do rows go to the ranks of their experts alone? layers/dispatch.py."""
        return self.ep_dispatch == "all_to_all"

    def __str__(self) -> str:
        return f"{self.layout}{', sp' * self.sp}{', all-to-all' * self.travels}"


def ways(gpus: int, config: ModelConfig, load: Load, ranks_a_host: int | None = None) -> list[Way]:
    """Every legal one that uses all GPUs; without `ranks_a_host` on whatever hosts.

    What an engine combines (Layout.refuse_what_is_not_combined); no more stages than layers, no more parts of a context than
    pages; a stage's tp ranks take part of one host or all of several. Experts are cut by columns, or dealt out over parts of
    these ranks; where rows are spread, over all of them, and with an all-to-all too. A latent cache has no context parallelism.
    """
    found = []
    for outer in layouts(gpus):
        if outer.pp > config.num_layers or (ranks_a_host and not has_its_hosts(outer, ranks_a_host)):
            continue
        cuts = [n for n in range(2, outer.tp + 1) if outer.tp % n == 0]
        inner = [Way(outer), Way(outer, sp=outer.tp > 1)]
        inner += [Way(replace(outer, attn_dp=n)) for n in cuts]
        inner += [Way(replace(outer, cp=n)) for n in cuts if n <= load.pages and config.latent is None]
        if config.mixture:
            inner += [dealt for way in inner for dealt in _dealt_out(way, config.mixture.num_experts)]
        found += [way for way in dict.fromkeys(inner) if _is_combined(way)]
    return found


def _dealt_out(way: Way, experts: int) -> list[Way]:
    tp = way.layout.tp
    parts = [n for n in range(2, min(tp, experts) + 1) if tp % n == 0 and (n == tp or not way.spreads)]
    dealt = [replace(way, layout=replace(way.layout, ep=n)) for n in parts]
    return dealt + [replace(one, ep_dispatch="all_to_all") for one in dealt if way.spreads]


def _is_combined(way: Way) -> bool:
    try:
        way.layout.refuse_what_is_not_combined(way.sp, ep_dispatch=way.ep_dispatch)
    except ValueError:
        return False
    return True


def has_its_hosts(layout: Layout, ranks_a_host: int) -> bool:
    """Does it need no more hosts than its ranks fill?"""
    try:
        return max(hosts(layout, ranks_a_host)) < -(-layout.world // ranks_a_host)
    except ValueError:
        return False


@lru_cache(maxsize=4096)
def hosts(layout: Layout, ranks_a_host: int) -> tuple[int, ...]:
    """Of each rank, the host that it runs on. Raises ValueError where a stage would share a host with a part of another."""
    mapped = get_rank_mapping(layout.tp, layout.pp, layout.dp, min(ranks_a_host, layout.world))
    return tuple(one.node for one in mapped)


@lru_cache(maxsize=4096)
def members(layout: Layout, kind: str, ranks_a_host: int) -> tuple[int, int]:
    """(ranks, hosts) of the group of this kind that lies on most hosts."""
    at = hosts(layout, ranks_a_host)
    groups = layout.groups(kind)
    return len(groups[0]), max(len({at[rank] for rank in ranks}) for ranks in groups)
