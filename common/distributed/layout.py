"""The world as a table: which rank computes what, and with whom it forms which group. Pure: nothing is started here.

    replica   whole copies of the model, each with a will of its own        dp of them
      stage   consecutive layers of one copy                                pp to a replica
        tp    the ranks that cut each layer of a stage between them         tp to a stage

    rank = (dp_rank * pp + pp_rank) * tp + tp_rank                          replicas are added to SGLang's order in front

Three more cuts are made *inside* the tp ranks of a stage; they never multiply the world:

    attention   tp_rank = (attn_dp_rank * cp + cp_rank) * attn_tp + attn_tp_rank
                attn_dp   whose requests: each holds its own, with pages of its own
                cp        which tokens of a request
                attn_tp   which heads
    experts     tp_rank = ep_rank * moe_tp + moe_tp_rank
                ep        which experts
                moe_tp    which columns of each

Neighbours talk most: tp ranks are adjacent, so that they share a host; stages and replicas lie further apart, because a stage
hands over one [T, D] where tp sums two a layer. SGLang 0.5.23, srt/distributed/parallel_state.py (initialize_model_parallel);
Megatron-LM's default order is tp-cp-ep-dp-pp, the fastest first.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from math import lcm
from typing import NamedTuple

# kind of group -> what its members have in common; they differ in all else
GROUPS = {
    "replica": ("dp",),
    "tp": ("dp", "pp"),
    "pp": ("dp", "tp"),
    "dp": ("pp", "tp"),
    "attn_tp": ("dp", "pp", "attn_dp", "cp"),
    "attn_dp": ("dp", "pp", "cp", "attn_tp"),
    "cp": ("dp", "pp", "attn_dp", "attn_tp"),
    "ep": ("dp", "pp", "moe_tp"),
    "moe_tp": ("dp", "pp", "ep"),
}


# how rows come to experts on other ranks (layers/dispatch.py), and which copy of one computes a row (layers/expert_placement.py)
EP_DISPATCHES, EP_ALGORITHMS = ("replicated", "all_to_all"), ("static", "dynamic")


class Place(NamedTuple):
    """A rank's number in every direction."""

    rank: int
    dp: int
    pp: int
    tp: int
    attn_dp: int
    cp: int
    attn_tp: int
    ep: int
    moe_tp: int


@dataclass(frozen=True)
class Layout:
    """How many there are in each direction. `Layout.of` is the checked way to make one."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    attn_dp: int = 1
    cp: int = 1
    ep: int = 1

    @classmethod
    def of(
        cls, tp: int | None = None, pp: int = 1, dp: int = 1, *, attn_dp: int = 1, cp: int = 1, ep: int = 1,
        world: int | None = None,
    ) -> "Layout":  # fmt: skip
        """tp by default what is left of the world: world / (pp * dp); without one, as few as its cuts need.

        Raises ValueError, with the numbers and the nearest legal ones, for a layout that is not `world` ranks, or cuts that
        do not divide tp.
        """
        sizes = {"tp": tp, "pp": pp, "dp": dp, "attn_dp": attn_dp, "cp": cp, "ep": ep, "world": world}
        for name, size in sizes.items():
            if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
                raise ValueError(f"{name}_size={size!r} must be a whole number of at least 1")
        if world is None:
            tp = tp or lcm(attn_dp * cp, ep)
            world = tp * pp * dp
        asked = tp
        tp = world // (pp * dp) if tp is None else tp
        if tp * pp * dp != world:
            product = f"pp_size={pp} x dp_size={dp}" if asked is None else f"tp_size={tp} x pp_size={pp} x dp_size={dp}"
            raise ValueError(
                f"{product} = {(asked or 1) * pp * dp} ranks, but {world} process(es) run; start with torchrun "
                f"--nproc_per_node={max(tp, 1) * pp * dp}, or lay {world} out as {_nearest(world, max(tp, 1), pp, dp)}"
            )
        layout = cls(tp, pp, dp, attn_dp, cp, ep)
        layout._refuse_cuts_that_do_not_divide()
        return layout

    @property
    def world(self) -> int:
        return self.dp * self.pp * self.tp

    @property
    def attn_tp(self) -> int:
        return self.tp // (self.attn_dp * self.cp)

    @property
    def moe_tp(self) -> int:
        return self.tp // self.ep

    def place(self, rank: int) -> Place:
        if not 0 <= rank < self.world:
            raise ValueError(f"rank={rank} is outside 0..{self.world - 1}")
        rest, tp_rank = divmod(rank, self.tp)
        dp_rank, pp_rank = divmod(rest, self.pp)
        attn, attn_tp_rank = divmod(tp_rank, self.attn_tp)
        attn_dp_rank, cp_rank = divmod(attn, self.cp)
        ep_rank, moe_tp_rank = divmod(tp_rank, self.moe_tp)
        return Place(rank, dp_rank, pp_rank, tp_rank, attn_dp_rank, cp_rank, attn_tp_rank, ep_rank, moe_tp_rank)

    def groups(self, kind: str) -> list[list[int]]:
        """All groups of a kind (GROUPS), each with its ranks in order.

        >>> Layout(tp=2, pp=2).groups("tp"), Layout(tp=2, pp=2).groups("pp")
        ([[0, 1], [2, 3]], [[0, 2], [1, 3]])
        """
        found: dict[tuple[int, ...], list[int]] = {}
        for place in map(self.place, range(self.world)):
            found.setdefault(tuple(getattr(place, name) for name in GROUPS[kind]), []).append(place.rank)
        return list(found.values())

    def group_of(self, kind: str, rank: int) -> list[int]:
        return next(group for group in self.groups(kind) if rank in group)

    def table(self) -> list[dict[str, int | list[int]]]:
        """A row a rank: its place, and the group of each kind that has more than one member."""
        return [
            self.place(rank)._asdict()
            | {f"{kind} group": group for kind in GROUPS if len(group := self.group_of(kind, rank)) > 1}
            for rank in range(self.world)
        ]

    def __str__(self) -> str:
        """tp2 x pp2; what is 1 is left out."""
        sizes = {name: size for name, size in asdict(self).items() if size > 1}
        outer = " x ".join(f"{name}{size}" for name, size in sizes.items() if name in ("tp", "pp", "dp")) or "tp1"
        inner = ", ".join(f"{name}{size}" for name, size in sizes.items() if name not in ("tp", "pp", "dp"))
        return f"{outer} ({inner})" if inner else outer

    def _refuse_cuts_that_do_not_divide(self) -> None:
        for names in (("attn_dp", "cp"), ("ep",)):
            cut = 1
            for name in names:
                cut *= getattr(self, name)
            if self.tp % cut:
                said = " x ".join(f"{name}_size={getattr(self, name)}" for name in names if getattr(self, name) > 1)
                legal = [n for n in range(1, self.tp + 1) if self.tp % n == 0]
                raise ValueError(
                    f"{said} does not divide tp_size={self.tp}, inside which it is cut; use a product of "
                    f"{', '.join(map(str, legal))}, or tp_size={-(-self.tp // cut) * cut}"
                )

    def refuse_what_is_not_combined(
        self, enable_layernorm_sp: bool = False, enable_two_batch_overlap: bool = False, ep_dispatch: str = "replicated",
        redundant_experts: int = 0,
    ) -> None:  # fmt: skip
        """Raises ValueError for a layout that has groups, but that no engine here runs."""
        sizes = {name: getattr(self, name) for name in ("pp", "attn_dp", "cp")}
        asked = [f"{name}_size={size}" for name, size in sizes.items() if size > 1]
        if len(asked) > 1:
            raise ValueError(
                f"{' and '.join(asked)} are not combined here; use one of them, beside tp_size= and dp_size="
            )
        if enable_two_batch_overlap and self.pp > 1:
            raise ValueError(
                f"enable_two_batch_overlap with {asked[0]}: stages overlap steps already; use one of the two"
            )
        if enable_layernorm_sp and self.pp > 1:
            raise ValueError(
                f"enable_layernorm_sp with {asked[0]}: a stage hands over whole rows, and it cuts them over ranks; leave it out"
            )
        if enable_layernorm_sp and asked:
            raise ValueError(
                f"enable_layernorm_sp with {asked[0]}, which cuts the rows over ranks already; leave it out"
            )
        if ep_dispatch not in EP_DISPATCHES:
            raise ValueError(f"ep_dispatch={ep_dispatch!r} is unknown; use {' or '.join(EP_DISPATCHES)}")
        if ep_dispatch == "all_to_all" and not (self.attn_dp > 1 or enable_layernorm_sp):
            raise ValueError(
                "ep_dispatch=all_to_all is for rows that are spread, and here every rank has all of a decode step; use "
                "attn_dp_size= or enable_layernorm_sp, or ep_dispatch=replicated"
            )
        if redundant_experts < 0:
            raise ValueError(f"ep_num_redundant_experts={redundant_experts} must be at least 0")
        if redundant_experts and self.ep == 1:
            raise ValueError(
                f"ep_num_redundant_experts={redundant_experts} with ep_size=1: copies share the load of several ranks; use "
                f"ep_size=2 or more, or leave it out"
            )


SIZES = tuple(field.name for field in fields(Layout))


def layouts(world: int) -> Iterator[Layout]:
    """Every tp x pp x dp that makes `world` ranks."""
    for tp in range(1, world + 1):
        for pp in range(1, world // tp + 1):
            if world % (tp * pp) == 0:
                yield Layout(tp, pp, world // (tp * pp))


def _nearest(world: int, tp: int, pp: int, dp: int) -> str:
    """The layout of `world` ranks that changes least of what was asked for."""
    asked = {"tp": tp, "pp": pp, "dp": dp}

    def change(layout: Layout) -> tuple[int, int]:
        differ = [abs(getattr(layout, name) - size) for name, size in asked.items()]
        return sum(map(bool, differ)), sum(differ)

    best = min(layouts(world), key=change)
    return f"tp_size={best.tp} pp_size={best.pp} dp_size={best.dp}"


class Mapped(NamedTuple):
    """Where a rank's process runs: the `slot`-th of host `node`."""

    place: Place
    node: int
    slot: int


def get_rank_mapping(tp: int, pp: int, dp: int, node_size: int = 8) -> list[Mapped]:
    """Ranks -> hosts of `node_size` devices each: the tp ranks of a stage never straddle two hosts.

    A host takes as many whole stages as fit; what is left of its devices stays idle. The stages of a replica are neighbours.
    Raises ValueError where tp > node_size and does not fill whole hosts: a stage of more ranks than a host has devices must
    take all of each, or its slowest link would serve ranks that other stages share.
    """
    layout = Layout.of(tp, pp, dp)
    if isinstance(node_size, bool) or not isinstance(node_size, int) or node_size < 1:
        raise ValueError(f"node_size={node_size!r} must be a whole number of at least 1")
    if tp > node_size and tp % node_size:
        below, above = tp // node_size * node_size, -(-tp // node_size) * node_size
        raise ValueError(
            f"tp_size={tp} over hosts of {node_size} would share a host with another stage; use tp_size={below} or {above}, "
            f"or at most {node_size}"
        )
    mapped = []
    for place in map(layout.place, range(layout.world)):
        stage = place.dp * pp + place.pp
        if tp >= node_size:
            node, slot = stage * (tp // node_size) + place.tp // node_size, place.tp % node_size
        else:
            a_host = node_size // tp  # stages
            node, slot = stage // a_host, stage % a_host * tp + place.tp
        mapped.append(Mapped(place, node, slot))
    return mapped
