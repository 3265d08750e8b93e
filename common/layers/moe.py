"""A mixture of experts in place of an MLP: a router sends each token to k of E small MLPs, and adds up what they give.

    x [T, D] -> router -> k experts a token, and their weights
             -> w13 [E, 2F, D], SwiGLU, w2 [E, D, F] of these experts -> weighted sum [T, D]
             -> + shared expert, where the model has one

Tensor parallelism cuts the columns of every expert as it cuts those of an MLP: each rank has 1/R of all experts, and the sum
over ranks is one all-reduce, of the shared expert's part too. The router is whole on every rank.

Expert parallelism gives a rank some experts whole, or with ep < tp their columns over moe_tp ranks (expert_placement.py). If
every rank has all rows, each computes those of its own experts, and the same all-reduce adds them up. If rows are spread,
they may travel to their experts and come home instead (dispatch.py); the shared expert is then whole on every rank, for its
own rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from common.layers.communicator import TokenRows
from common.layers.dispatch import add_at_home, set_out, set_out_fixed
from common.layers.expert_moves import move_layer
from common.layers.expert_placement import ExpertPlacement
from common.layers.heads import split_evenly
from common.layers.linear import ReplicatedLinear, loadable
from common.layers.mlp import MLP
from common.layers.moe_runner import Matrices, SharedMatrices, grouped_mm_takes, pick_runner
from common.layers.router import Router, RouterRule
from common.parallel_state import TPGroup, all_reduce
from common.quantization.method import PLAIN, LayerMethods
from common.quantization.packed_codes import CodedMatrices


@dataclass(frozen=True)
class Mixture:
    """The facts of a model with experts.

    sparse: of each layer, whether it has experts or an MLP. shared_size: width of the expert that every token visits, 0 for
    none; shared_gate: what it gives counts sigmoid(shared_expert_gate(x)).
    """

    num_experts: int  # E
    router: RouterRule
    intermediate_size: int  # F of one expert
    sparse: tuple[bool, ...]
    shared_size: int = 0
    shared_gate: bool = False


@dataclass(frozen=True)
class MoEOptions:
    """What is chosen by flags, and changes no result but for the last bits.

    runner: a form of moe_runner.py, or auto. ep: the ranks among which experts are dealt out, by default none; moe_tp: those
    that cut the columns of each, by default all of the layer. dispatch, redundant, algorithm: dispatch.py, expert_placement.py.
    placed: where experts lie already, for a copy of a model that runs.
    """

    runner: str = "auto"
    ep: TPGroup | None = None
    moe_tp: TPGroup | None = None
    dispatch: str = "replicated"
    redundant: int = 0
    algorithm: str = "static"
    placed: ExpertPlacement | None = None

    def placement(self, num_layers: int, mixture: Mixture, tp: TPGroup) -> ExpertPlacement:
        """Of a model's layers on this rank."""
        if self.placed is not None:
            return self.placed
        ep, moe_tp = self.ep or TPGroup(device=tp.device), self.moe_tp or tp
        return ExpertPlacement(num_layers, mixture.num_experts, ep, moe_tp, self.redundant, self.algorithm, tp.device)


AUTO = MoEOptions()


class Experts(nn.Module):
    """The weights of a rank's experts, packed: w13 [S, 2F', D], gate above up, and w2 [S, D, F']; zero where F is padded.

    held: the expert in each of the S slots, by default all of them; None leaves a slot zero, and one that stands twice is read
    once. A checkpoint has three tensors for each expert, by shard id (expert, part): gate, up and down are parts 0, 1 and 2.
    Or it has all experts in two, gate_up_proj [E, 2F, D] and down_proj [E, D, F], of which an expert is one matrix
    (`fused_shapes`).

    methods: of "w13" and "w2". One with a method has no memory, as the weight of a linear layer; `coded` has its codes.
    """

    def __init__(
        self, hidden_size: int, mixture: Mixture, moe_tp: TPGroup, held: Sequence[int | None] | None = None,
        methods: LayerMethods = PLAIN,
    ):  # fmt: skip
        super().__init__()
        self.coded = nn.ModuleDict()
        count, self.width = mixture.num_experts, mixture.intermediate_size
        held = range(count) if held is None else held
        self.slots_of = {e: [slot for slot, one in enumerate(held) if one == e] for e in held if e is not None}
        self.local, self.pieces = split_evenly(self.width, moe_tp.rank, moe_tp.size)
        self.w13 = self._packed(
            "w13", (len(held), 2 * self.local, hidden_size), (0, 1), (self.width, hidden_size), methods
        )
        self.w13.fused_shapes = {None: (count, 2 * self.width, hidden_size)}
        self.w2 = self._packed("w2", (len(held), hidden_size, self.local), (2,), (hidden_size, self.width), methods)
        self.w2.fused_shapes = {None: (count, hidden_size, self.width)}

    def _packed(
        self, name: str, shape: tuple[int, int, int], parts: tuple[int, ...], full: tuple[int, int], methods: LayerMethods
    ) -> nn.Parameter:  # fmt: skip
        shards = {(expert, part): full for expert in self.slots_of for part in parts}
        if (method := methods(name)) is not None:
            self.coded[name] = CodedMatrices(method, shape)
        values = torch.zeros(shape) if method is None else torch.empty(shape, device="meta")
        return loadable(values, self.load_down if parts == (2,) else self.load_gate_up, shards)

    @property
    def matrices(self) -> tuple[Matrices, Matrices]:
        """(w13, w2), as a runner takes them: codes where such are kept."""
        return tuple(self.coded[name] if name in self.coded else getattr(self, name) for name in ("w13", "w2"))

    def load_gate_up(self, source, shard_id) -> None:
        fused = shard_id is None
        for expert, part in self.w13.shard_shapes if fused else [shard_id]:
            first = part * self.width if fused else 0  # gate above up, in the file as here
            for dst, src, n in self.pieces:
                rows = slice(first + src, first + src + n)
                self._load("w13", source, expert if fused else None, 0, rows, part * self.local + dst, expert)

    def load_down(self, source, shard_id) -> None:
        fused = shard_id is None
        for expert, _ in self.w2.shard_shapes if fused else [shard_id]:
            for dst, src, n in self.pieces:
                self._load("w2", source, expert if fused else None, 1, slice(src, src + n), dst, expert)

    def _load(self, name: str, source, matrix: int | None, dim: int, part: slice, at: int, expert: int) -> None:
        """Rows (dim 0) or columns (dim 1) of an expert's matrix, of that number if several are stacked -> from `at` on here."""
        one = {} if matrix is None else {"matrix": matrix}
        if name in self.coded:
            rows, columns = (slice(0, size) if i != dim else part for i, size in enumerate(source.shape[-2:]))
            self.coded[name].put(self.slots_of[expert], dim, at, source.codes(rows, columns, **one))
            return
        values = source.read(dim, part.start, part.stop, **one)
        for slot in self.slots_of[expert]:
            getattr(self, name)[slot].narrow(dim, at, values.shape[dim]).copy_(values)


class MoE(nn.Module):
    """x [T, D] -> [T, D], with the face of an MLP: one all-reduce at its end unless reduce_results=False.

    layer: its number in `placement`, which all layers of a model share. `travels`: forward gets this rank's rows, and gives
    back those, summed: whoever calls it gathers and scatters nothing.
    """

    def __init__(
        self, hidden_size: int, mixture: Mixture, tp: TPGroup, name: str = "", reduce_results: bool = True,
        options: MoEOptions = AUTO, placement: ExpertPlacement | None = None, layer: int = 0,
        methods: LayerMethods = PLAIN,
    ):  # fmt: skip
        super().__init__()
        self.tp, self.name, self.reduce_results, self.layer = tp, name, reduce_results, layer
        self.travels = options.dispatch == "all_to_all"
        self.placement = placement or options.placement(1, mixture, tp)
        self.gate = Router(hidden_size, mixture.num_experts, mixture.router)
        self.runner = pick_runner(options.runner, tp.device)
        self.experts = Experts(
            hidden_size, mixture, self.placement.moe_tp, self.placement.held(layer),
            PLAIN if self.runner.name == "triton" else methods.under("experts"),
        )  # fmt: skip
        self.shared_expert = self.shared_expert_gate = None
        if mixture.shared_size:
            ranks = TPGroup(device=tp.device) if self.travels else tp
            self.shared_expert = MLP(
                hidden_size, mixture.shared_size, ranks, f"{name}.shared_expert", reduce_results=False,
                methods=methods.under("shared_expert"),
            )  # fmt: skip
        if mixture.shared_gate:
            self.shared_expert_gate = ReplicatedLinear(hidden_size, 1, tp, name=f"{name}.shared_expert_gate")

    def forward(self, x: torch.Tensor, rows: TokenRows | None = None, live: torch.Tensor | None = None) -> torch.Tensor:
        """rows: how the step's rows are spread, if they are; live [T]: else which are real, None for all."""
        if self.travels:
            return self._send_rows(x, rows)
        live = rows.live if rows and not rows.everywhere else live
        weights, experts = self.gate.route(x, live)  # [T, k]
        experts = self.placement.here(self.layer, experts)
        self.placement.note(self.layer, experts, live)
        y = self.runner.run(
            x, weights, experts, *self.experts.matrices, **self._shared(x, experts)
        )  # [T, D], a partial sum
        if self.reduce_results:
            y = all_reduce(y, self.tp, f"{self.name}.down_proj")  # COMM all-reduce [T, D]: partial sums -> full sum
        return y

    def _send_rows(self, x: torch.Tensor, rows: TokenRows) -> torch.Tensor:
        """x [held, D] -> [held, D]. The shared expert is computed while the rows are on their way."""
        here = len(x) if rows.fixed else rows.real_on(self.tp.rank)
        weights, experts = self.gate.route(x[:here])
        places = self.placement.locate(self.layer, experts, self.placement.ep.rank)
        if rows.fixed:
            live = rows.live_on(self.tp.rank)
            there = set_out_fixed(x, places, live, self.placement, self.tp, self.name)
        else:
            there = set_out(x[:here], places, self.placement, self.tp, self.name)
        shared = None if self.shared_expert is None else self.shared(x)
        came, slots = there.received()  # [n, D], [n]
        slots = slots.unsqueeze(1)
        self.placement.note(self.layer, slots)
        y = self.runner.run(came, came.new_ones(slots.shape), slots, *self.experts.matrices)
        y = add_at_home(there.home(y), weights, experts)
        y = F.pad(y, (0, 0, 0, len(x) - here)) if here < len(x) else y
        return y if shared is None else y + shared

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph may hold it."""
        one_product = all(map(grouped_mm_takes, self.experts.matrices))
        return self.runner.capturable and (self.runner.name != "grouped" or one_product)

    def move_experts(self, new: torch.Tensor) -> None:
        """Fetch and give away weights, so that they lie as new [P] says; `placement` is told afterwards, once for all layers."""
        move_layer(self.experts.w13, self.experts.w2, self.placement, self.layer, new)

    def _shared(self, x: torch.Tensor, experts: torch.Tensor) -> dict[str, torch.Tensor | SharedMatrices]:
        """What a runner is given of the shared expert: its matrices where it multiplies by them itself, else what it gives."""
        expert, gate = self.shared_expert, self.shared_expert_gate
        if expert is None:
            return {}
        one, two = expert.gate_up_proj, expert.down_proj
        plain = one.method is None and two.method is None
        if plain and self.runner.takes_along(experts, self.experts.w2, one.weight, two.weight):
            return {"shared": SharedMatrices(one.weight, two.weight, None if gate is None else gate(x).sigmoid())}
        return {"added": self.shared(x)}

    def shared(self, x: torch.Tensor) -> torch.Tensor:
        """What the shared expert gives, a partial sum: the gate is whole on every rank, and so is its factor."""
        y = self.shared_expert(x)
        return y if self.shared_expert_gate is None else self.shared_expert_gate(x).sigmoid() * y
