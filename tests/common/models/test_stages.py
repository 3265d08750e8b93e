import doctest
import math

import pytest
import torch

from common.models import stages
from common.models.config import ModelConfig
from common.models.stages import Stage, layer_partition, stage_layers
from common.models.weights import load_model
from common.parallel_state import TPGroup
from tests.common.models.files import rewrite, tensors


def test_the_docstring_says_what_is():
    assert doctest.testmod(stages).failed == 0


@pytest.mark.parametrize("num_layers", range(1, 20))
def test_every_layer_has_one_stage_and_the_last_ones_have_one_more(num_layers):
    for size in range(1, num_layers + 1):
        parts = [stage_layers(num_layers, size, rank) for rank in range(size)]
        assert [layer for part in parts for layer in part] == list(range(num_layers))
        lengths = list(map(len, parts))
        assert lengths == sorted(lengths)
        assert lengths[-1] - lengths[0] <= 1


@pytest.mark.parametrize(
    ("num_layers", "size", "partition", "said"),
    [
        (3, 4, None, "pp_size=4 stages for 3 layers: every stage needs one; use pp_size=3 or less"),
        (22, 3, (8, 8, 7), "pp_layer_partition=8,8,7 makes 23 layers, but the model has 22; use 7,7,8"),
        (22, 3, (11, 11), r"lists 2 stage\(s\), but pp_size=3; use 7,7,8"),
        (22, 3, (0, 11, 11), "leaves a stage without layers; use 7,7,8"),
    ],
)
def test_a_split_that_is_none_is_one_line_with_the_way_out(num_layers, size, partition, said):
    for rank in range(size):
        with pytest.raises(ValueError, match=said):
            stage_layers(num_layers, size, rank, partition)


def test_a_list_comes_from_the_flag_or_from_sglang_s_variable():
    there = {"SGLANG_PP_LAYER_PARTITION": "8, 8,6"}
    assert layer_partition(None, {}) is None
    assert layer_partition(None, there) == (8, 8, 6)
    assert layer_partition("1,2", there) == (1, 2)


@pytest.mark.parametrize("written", ["", "8,", "8;8", "8,-1", "1.5,2", "a", "8,8\n,", "1e3"])
def test_a_list_of_something_else_is_one_line(written):
    with pytest.raises(ValueError, match=r"pp_layer_partition=.* must be the number of layers of each stage"):
        layer_partition(written, {})


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("size", [2, 3])
def test_a_stage_reads_its_own_layers_and_its_end_of_the_model(checkpoint, name, size):
    folder = checkpoint(name)
    stored, tied = tensors(folder), ModelConfig.from_folder(folder).tie_word_embeddings
    whole, _ = load_model(folder, TPGroup())
    for rank in range(size):
        model, report = load_model(folder, TPGroup(), stage=Stage(rank, size))
        layers = stage_layers(3, size, rank)
        mine = {key for key in stored if any(key.startswith(f"model.layers.{i}.") for i in layers)}
        if rank == 0:
            mine.add("model.embed_tokens.weight")
        if rank == size - 1:
            mine |= {"model.norm.weight", "model.embed_tokens.weight" if tied else "lm_head.weight"}
        assert set(report.tensors) == mine
        assert report.bytes_read == sum(stored[key].nbytes for key in mine)
        parameters = dict(model.named_parameters())
        assert report.bytes_read == sum(p.nbytes for p in parameters.values())  # and takes memory for no other
        for key, param in parameters.items():
            assert torch.equal(param, whole.get_parameter(key)), key


@pytest.mark.parametrize("rank", range(2))
def test_a_stage_refuses_a_checkpoint_that_lacks_a_layer_of_another_one(copy, rank):
    folder = copy("llama")
    rewrite(folder, lambda found: [found.pop(key) for key in list(found) if ".layers.0.mlp.up_proj" in key])
    with pytest.raises(ValueError, match=r"1 missing: model\.layers\.0\.mlp\.up_proj\.weight"):
        load_model(folder, TPGroup(), stage=Stage(rank, 2))


def test_ranks_of_a_stage_cut_its_layers(checkpoint):
    folder = checkpoint("qwen3")
    for rank in range(2):
        model, report = load_model(folder, TPGroup(rank, 2), stage=Stage(1, 2))
        alone, whole = load_model(folder, TPGroup(), stage=Stage(1, 2))
        assert model.model.layers[1].mlp.down_proj.weight.shape[1] == math.ceil(
            alone.model.layers[1].mlp.down_proj.weight.shape[1] / 2
        )
        assert whole.bytes_read / 2 < report.bytes_read < 0.52 * whole.bytes_read  # half, and the norms
