"""A layer of experts against transformers' block, whole and cut over ranks, and what each rank reads of a checkpoint."""

import pytest
import torch
from transformers import MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from common.layers.cpu_linear import choose_forms, packs
from common.layers.moe import Mixture, MoE, MoEOptions
from common.layers.router import RouterRule
from common.models.weights import TensorSource
from common.parallel_state import TPGroup
from tests.common.in_memory import InMemory
from tests.common.kernels.where import DEVICE, kernel

D, E, WIDTH, SHARED = 24, 5, 11, 13
BLOCKS = {
    "Qwen2-MoE": (
        Qwen2MoeSparseMoeBlock(Qwen2MoeConfig(
            hidden_size=D, num_experts=E, moe_intermediate_size=WIDTH, shared_expert_intermediate_size=SHARED,
            num_experts_per_tok=2)),
        Mixture(E, RouterRule(2, normalise=False), WIDTH, (True,), SHARED, True)),
    "Qwen3-MoE": (
        Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(
            hidden_size=D, num_experts=E, moe_intermediate_size=WIDTH, num_experts_per_tok=3, norm_topk_prob=True)),
        Mixture(E, RouterRule(3), WIDTH, (True,))),
    "Mixtral": (
        MixtralSparseMoeBlock(MixtralConfig(hidden_size=D, num_local_experts=E, intermediate_size=WIDTH)),
        Mixture(E, RouterRule(2), WIDTH, (True,))),
}  # fmt: skip
every_block = pytest.mark.parametrize("name", BLOCKS)


def filled(name):
    """transformers' block with random numbers, and the facts of ours."""
    block, mixture = BLOCKS[name]
    block.experts.config._experts_implementation = "eager"  # its default does not take odd widths
    generator = torch.Generator().manual_seed(0)
    for param in block.parameters():
        param.data = 0.3 * torch.randn(param.shape, generator=generator)
    return block, mixture


def sources(block, fused):
    """{name of one of our parameters: {shard id: what it is loaded from}}."""
    experts, out = block.experts, {"gate.weight": {None: InMemory(block.gate.weight)}}
    if fused:
        out["experts.w13"] = {None: TensorSource(experts.gate_up_proj)}
        out["experts.w2"] = {None: TensorSource(experts.down_proj)}
    else:
        halves = enumerate(experts.gate_up_proj.split(WIDTH, dim=1))
        out["experts.w13"] = {(e, part): InMemory(half[e]) for part, half in halves for e in range(E)}
        out["experts.w2"] = {(e, 2): InMemory(experts.down_proj[e]) for e in range(E)}
    if hasattr(block, "shared_expert"):
        shared = block.shared_expert
        out["shared_expert.gate_up_proj.weight"] = {
            0: InMemory(shared.gate_proj.weight),
            1: InMemory(shared.up_proj.weight),
        }
        out["shared_expert.down_proj.weight"] = {None: InMemory(shared.down_proj.weight)}
        out["shared_expert_gate.weight"] = {None: InMemory(block.shared_expert_gate.weight)}
    return out


def ours(block, mixture, ranks=1, fused=False, runner="auto"):
    """(the layer on each of R ranks, what each was loaded from)."""
    layers, read = [], []
    for rank in range(ranks):
        layer = MoE(
            D, mixture, TPGroup(rank, ranks), "mlp", reduce_results=ranks == 1, options=MoEOptions(runner=runner)
        )
        read.append(sources(block, fused))
        for name, param in layer.named_parameters():
            assert set(read[-1][name]) == set(
                param.fused_shapes if fused and "experts.w" in name else param.shard_shapes
            )
            for shard_id, source in read[-1][name].items():
                param.weight_loader(source, shard_id)
        layers.append(layer)
    return layers, read


def tokens(n):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@every_block
@pytest.mark.parametrize("runner", ["loop", "grouped"])
@pytest.mark.parametrize("fused", [False, True], ids=["a tensor for each expert", "all experts in one"])
def test_one_rank_is_transformers_block(name, runner, fused):
    block, mixture = filled(name)
    (layer,), _ = ours(block, mixture, fused=fused, runner=runner)
    for n in (0, 1, 2, 40):
        torch.testing.assert_close(layer(tokens(n)), block(tokens(n)[None])[0])


@torch.no_grad()
@every_block
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("fused", [False, True], ids=["a tensor for each expert", "all experts in one"])
def test_partial_sums_of_all_ranks_are_the_block(name, ranks, fused):
    block, mixture = filled(name)
    layers, _ = ours(block, mixture, ranks, fused)
    torch.testing.assert_close(sum(layer(tokens(30)) for layer in layers), block(tokens(30)[None])[0])


@every_block
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_each_row_and_column_of_an_expert_is_read_by_one_rank_once(name, ranks):
    block, mixture = filled(name)
    _, read = ours(block, mixture, ranks)
    for parameter, dim in (("experts.w13", 0), ("experts.w2", 1)):
        for shard_id in read[0][parameter]:
            times = [of_rank[parameter][shard_id].times_read(dim) for of_rank in read]
            assert [sum(column) for column in zip(*times, strict=True)] == [1] * WIDTH


@torch.no_grad()
def test_the_gate_of_the_shared_expert_counts_once_and_not_on_every_rank():
    """It multiplies each rank's part; multiplied after the sum it would be the same, added R times it would not."""
    block, mixture = filled("Qwen2-MoE")
    layers, _ = ours(block, mixture, 2)
    x = tokens(6)
    want = torch.sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x)
    torch.testing.assert_close(layers[0].shared(x) + layers[1].shared(x), want)


def test_the_gates_lie_whole_on_every_rank():
    block, mixture = filled("Qwen2-MoE")
    layers, _ = ours(block, mixture, 3)
    for layer in layers:
        assert torch.equal(layer.gate.weight, block.gate.weight)
        assert torch.equal(layer.shared_expert_gate.weight, block.shared_expert_gate.weight)


@torch.no_grad()
@pytest.mark.parametrize("form", ["row-major", "column-major", "packed", "apart", None])
def test_the_form_of_matrices_on_a_cpu_is_none_of_the_experts_business(form):
    """cpu_linear.py gives the shared expert's matrices another form; packed experts and the gates stay as they are."""
    if form == "packed" and not packs(torch.float32):
        pytest.skip("this build of torch does not pack matrices for this CPU")
    block, mixture = filled("Qwen2-MoE")
    (layer,), _ = ours(block, mixture)
    experts, want = [layer.experts.w13, layer.experts.w2, layer.gate.weight], block(tokens(9)[None])[0]
    choices = choose_forms(layer, form)
    assert {name for choice in choices for name in choice.names} == {
        "mlp.shared_expert.gate_up_proj", "mlp.shared_expert.down_proj",
    }  # fmt: skip
    assert all(a is b for a, b in zip(experts, [layer.experts.w13, layer.experts.w2, layer.gate.weight], strict=True))
    torch.testing.assert_close(layer(tokens(9)), want)


def with_a_shared_one(gated: bool, width: int, shared: int) -> tuple[Mixture, dict[str, torch.Tensor]]:
    """A mixture of 5 experts, 3 a token, and random tensors: name -> shape as one rank has them."""
    random, shapes = torch.Generator().manual_seed(3), {
        "gate.weight": (E, D), "experts.w13": (E, 2 * width, D), "experts.w2": (E, D, width),
        "shared_expert.gate_up_proj.weight": (2 * shared, D), "shared_expert.down_proj.weight": (D, shared),
        "shared_expert_gate.weight": (1, D),
    }  # fmt: skip
    values = {name: 0.3 * torch.randn(shape, generator=random) for name, shape in shapes.items()}
    return Mixture(E, RouterRule(3), width, (True,), shared, gated), values


def on_a_rank(mixture, values, rank, ranks, ep=1, runner="triton"):
    """The layer of one of R ranks, `ep` groups of which have experts of their own; and what else its runner was given."""
    tp, moe_tp = TPGroup(rank, ranks, device=DEVICE), TPGroup(rank % (ranks // ep), ranks // ep, device=DEVICE)
    options = MoEOptions(runner, TPGroup(rank // (ranks // ep), ep, device=DEVICE), moe_tp)
    layer, given = MoE(D, mixture, tp, "mlp", reduce_results=False, options=options), []
    for name, param in layer.named_parameters():
        parts = values[name].chunk(2) if "gate_up" in name else [values[name]]
        for shard_id in getattr(param, "fused_shapes", param.shard_shapes):
            source = TensorSource(parts[shard_id or 0])
            param.weight_loader(source, shard_id)
    run = layer.runner.run
    layer.runner = layer.runner._replace(run=lambda *args, **more: given.append(set(more)) or run(*args, **more))
    return layer.to(DEVICE), given


@kernel
@torch.no_grad()
@pytest.mark.parametrize(
    ("ranks", "ep", "gated", "along"),
    [(1, 1, False, True), (3, 1, True, True), (2, 2, True, True), (4, 2, False, True), (4, 4, True, False)],
)
def test_a_shared_expert_goes_along_wherever_it_is_as_wide_as_some_of_the_others(ranks, ep, gated, along):
    """Width 12, shared 24: over 4 ranks 6 columns, of which experts dealt out whole have 12. All against the loop on one rank."""
    mixture, values = with_a_shared_one(gated, 12, 24)
    x = tokens(1).to(DEVICE)
    alone, _ = on_a_rank(mixture, values, 0, 1, runner="loop")
    parts = 0
    for rank in range(ranks):
        layer, given = on_a_rank(mixture, values, rank, ranks, ep)
        parts = parts + layer(x)
        layer(tokens(5).to(DEVICE))
        assert given == [{"shared"} if along else {"added"}, {"added"}]  # five tokens have it by itself
    torch.testing.assert_close(parts, alone(x), rtol=1e-5, atol=1e-5)
