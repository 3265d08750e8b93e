"""Experts in the files: a tensor for each or all in one; what a rank reads of them, and what is refused before."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from common.models.weights import CheckpointTensor, load_model, load_then_shard
from common.parallel_state import TPGroup
from tests.common.models.dense import logits_of
from tests.common.models.files import rewrite, tensors
from tests.oracle import reference_model

FAMILIES = ["qwen2_moe", "qwen3_moe", "mixtral", "one_of_60"]
every_family = pytest.mark.parametrize("name", FAMILIES)
IDS = list(range(3, 40))


@pytest.fixture
def fused(checkpoint, tmp_path):
    """fused(name) -> the same checkpoint with the experts of a layer in two tensors, as transformers 5 holds them."""

    def make(name):
        model = AutoModelForCausalLM.from_pretrained(checkpoint(name), dtype=torch.float32)
        model.save_pretrained(tmp_path / name, save_original_format=False)
        return tmp_path / name

    return make


def experts_of(folder):
    return {name: x for name, x in tensors(folder).items() if ".experts." in name}


# --- the right numbers


@every_family
def test_logits_are_those_of_transformers(name, checkpoint):
    model, _ = load_model(checkpoint(name), TPGroup())
    with torch.inference_mode():
        expected = reference_model(checkpoint(name))(torch.tensor([IDS])).logits[0]
    assert ((logits_of(model, IDS) - expected).abs().max() / expected.abs().max()).item() < 1e-5


@every_family
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_both_layouts_give_the_same_model(name, ranks, checkpoint, fused):
    together = fused(name)
    assert len(experts_of(checkpoint(name))) > len(experts_of(together)) > 0
    for rank in range(ranks):
        one, one_report = load_model(checkpoint(name), TPGroup(rank, ranks))
        other, other_report = load_model(together, TPGroup(rank, ranks))
        for (key, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
            assert torch.equal(a, b), key
        assert one_report.bytes_read == other_report.bytes_read


@every_family
def test_bfloat16_is_what_transformers_rounds_to(name, checkpoint):
    model, _ = load_model(checkpoint(name), TPGroup(), torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint(name), dtype=torch.bfloat16)
    layer = next(i for i, sparse in enumerate(model.config.mixture.sparse) if sparse)
    mine, block = model.model.layers[layer].mlp, theirs.model.layers[layer].mlp
    assert torch.equal(mine.experts.w13, block.experts.gate_up_proj)
    assert torch.equal(mine.experts.w2, block.experts.down_proj)
    assert torch.equal(mine.gate.weight, block.gate.weight)


# --- read once


@every_family
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_all_ranks_together_read_each_byte_of_the_experts_once(name, ranks, checkpoint):
    """Width 37 over 3 ranks: 13, 13 and 11 columns of every expert."""
    folder, seen = checkpoint(name), {}

    class Counting(CheckpointTensor):
        def read(self, dim, start, stop, matrix=None):
            x = super().read(dim, start, stop, matrix)
            seen[self.name] = seen.get(self.name, 0) + x.nbytes
            return x

    for rank in range(ranks):
        load_model(folder, TPGroup(rank, ranks), source=Counting)
    for key, x in experts_of(folder).items():
        assert seen[key] == x.nbytes, key
    for key in (name for name in seen if name.endswith(("mlp.gate.weight", "moe.gate.weight", "expert_gate.weight"))):
        assert seen[key] == ranks * tensors(folder)[key].nbytes, key  # whole on every rank


def test_a_rank_of_two_reads_half_of_the_experts_and_the_old_way_all(checkpoint):
    folder = checkpoint("mixtral")
    total = sum(x.nbytes for x in tensors(folder).values())
    _, mine = load_model(folder, TPGroup(0, 2))
    _, old = load_then_shard(folder, TPGroup(0, 2))
    assert mine.bytes_read < 0.52 * total
    assert old.bytes_read == total


# --- refused by name, before anything is read


class Untouchable(CheckpointTensor):
    def read(self, *_, **__):
        raise AssertionError(f"{self.name} was read")


def refuse(folder, *words):
    for rank in range(2):
        with pytest.raises(ValueError, match=r"the weights do not fit|config.json says") as caught:
            load_model(folder, TPGroup(rank, 2), source=Untouchable)
        for word in words:
            assert word in str(caught.value)
        assert "\n" not in str(caught.value)


def test_the_tests_below_would_notice_a_read(checkpoint):
    with pytest.raises(AssertionError, match="was read"):
        load_model(checkpoint("qwen3_moe"), TPGroup(), source=Untouchable)


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("qwen3_moe", "model.layers.2.mlp.experts.6.up_proj.weight"),
        ("qwen2_moe", "model.layers.1.mlp.shared_expert_gate.weight"),
        ("qwen2_moe", "model.layers.3.mlp.shared_expert.down_proj.weight"),
        ("qwen3_moe", "model.layers.0.mlp.gate.weight"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.7.w2.weight"),
        ("mixtral", "model.layers.1.block_sparse_moe.gate.weight"),
    ],
)
def test_a_missing_tensor_is_named_as_the_files_would_name_it(copy, name, gone):
    folder = copy(name)
    rewrite(folder, lambda x: x.pop(gone))
    refuse(folder, f"tensors 1 missing: {gone};")


@pytest.mark.parametrize(
    ("wrong", "shape", "want"),
    [
        ("model.layers.2.mlp.experts.3.gate_proj.weight", [96, 41], [41, 96]),
        ("model.layers.0.mlp.experts.3.down_proj.weight", [96, 40], [96, 41]),
        ("model.layers.0.mlp.gate.weight", [9, 96], [7, 96]),
    ],
)
def test_a_wrong_shape_is_named_with_the_right_one(copy, wrong, shape, want):
    folder = copy("qwen3_moe")
    rewrite(folder, lambda x: x.update({wrong: torch.ones(shape)}))
    refuse(folder, f"1 of wrong shape: {wrong} is {shape}, not {want};")


def test_experts_that_the_config_does_not_know_are_unexpected(copy):
    folder = copy("qwen3_moe")
    extra = {f"model.layers.0.mlp.experts.7.{part}_proj.weight": torch.ones(2) for part in ("down", "gate", "up")}
    rewrite(folder, lambda x: x.update(extra))
    refuse(folder, f"3 unexpected: {', '.join(sorted(extra))};")


def test_a_dense_layer_among_sparse_ones_is_named(copy):
    folder = copy("qwen3_moe")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "mlp_only_layers": []}))
    refuse(folder, "22 missing: model.layers.1.mlp.experts.0.down_proj.weight", "3 unexpected: model.layers.1.mlp.down")


@pytest.mark.parametrize("missing", ["gate_up_proj", "down_proj"])
def test_fused_experts_with_a_tensor_missing(fused, missing):
    folder = fused("qwen3_moe")
    rewrite(folder, lambda x: x.pop(f"model.layers.0.mlp.experts.{missing}"))
    refuse(folder, "missing: model.layers.0.mlp.experts.0.")


@pytest.mark.parametrize(
    ("name", "wrong", "shape", "want"),
    [
        ("qwen3_moe", "gate_up_proj", [7, 96, 82], [7, 82, 96]),  # transposed, as some families store it
        ("qwen3_moe", "down_proj", [6, 96, 41], [7, 96, 41]),
        ("mixtral", "gate_up_proj", [8, 75, 128], [8, 150, 128]),
    ],
)
def test_fused_experts_of_wrong_shape(fused, name, wrong, shape, want):
    folder = fused(name)
    key = f"model.layers.2.mlp.experts.{wrong}"
    rewrite(folder, lambda x: x.update({key: torch.ones(shape)}))
    refuse(folder, f"1 of wrong shape: {key} is {shape}, not {want};")


@pytest.mark.parametrize(
    ("key", "size"),
    [("num_local_experts", 10**9), ("moe_intermediate_size", 10**12), ("shared_expert_intermediate_size", 10**15)],
)
def test_sizes_beyond_the_files_are_refused_before_they_cost_memory(copy, key, size):
    folder = copy("qwen2_moe")
    raw = json.loads((folder / "config.json").read_text())
    raw.pop("num_experts")
    (folder / "config.json").write_text(json.dumps({**raw, key: size}))
    said = "num_experts" if "num" in key else key
    refuse(folder, f"config.json says {said}={size}, but the weight files have no tensor longer than 1009")


def test_a_number_that_is_not_finite_is_found_in_an_expert(copy):
    folder, name = copy("mixtral"), "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    path = folder / "model.safetensors"
    content = load_file(path)
    content[name][5, 6] = math.nan
    save_file(content, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"NaN or infinity as float32 in 1 tensors: {name} \(1 of 9600\)"):
        load_model(folder, TPGroup(), check_finite=True)
