import json
import math

import pytest
import torch
from safetensors.torch import save_file

from common.layers.heads import HeadLayout, split_evenly
from common.models.checkpoint import checkpoint_files
from common.models.config import ModelConfig
from common.models.weights import CheckpointTensor, LoadReport, load_model, load_then_shard
from common.parallel_state import TPGroup
from tests.common.models.files import rewrite, tensors
from tests.oracle import save_random

NORM = "model.norm.weight"
MODELS = ["qwen2", "qwen3", "llama"]  # 14/2 heads tied and biased; 16/8 with head norms; 8/2 untied
over_models = pytest.mark.parametrize("name", MODELS)
over_ranks = pytest.mark.parametrize("ranks", [1, 2, 3, 4])


@pytest.fixture(scope="module")
def loaded(checkpoint):
    """loaded(name, R) -> [(model, report) of rank 0, of rank 1, ...], all in this process."""
    made = {}

    def get(name, ranks):
        if (name, ranks) not in made:
            made[name, ranks] = [load_model(checkpoint(name), TPGroup(rank, ranks)) for rank in range(ranks)]
        return made[name, ranks]

    return get


def count(numbers):
    return math.prod(numbers)


# --- the shards put together


def even(parts, size, dim=0):
    """Cut evenly and padded at the end: side by side, without the padding, which must be zero."""
    whole = torch.cat(parts, dim)
    assert not whole.narrow(dim, size, whole.shape[dim] - size).any()
    return whole.narrow(dim, 0, size)


def by_heads(parts, heads, size, d, dim=0):
    """parts[rank] holds heads[rank]: put each head where it belongs; copies are equal, zero heads are zero."""
    shape = list(parts[0].shape)
    shape[dim] = size
    whole = torch.full(shape, math.nan)
    for part, of_rank in zip(parts, heads, strict=True):
        assert part.shape[dim] == len(of_rank) * d
        for i, head in enumerate(of_rank):
            mine = part.narrow(dim, i * d, d)
            if head is None:
                assert not mine.any()
                continue
            place = whole.narrow(dim, head * d, d)
            assert place.isnan().all() or torch.equal(place, mine)
            place.copy_(mine)
    return whole


def put_together(models):
    """The checkpoint that these ranks' parameters came from."""
    config = models[0].config
    d, out = config.head_dim, {}
    q_heads, kv_heads = [m.heads.q_heads for m in models], [m.heads.kv_heads for m in models]

    def of(path):
        return [m.get_parameter(path).data for m in models]

    def same(path):
        first, *others = of(path)
        assert all(torch.equal(first, x) for x in others)
        return first

    out["model.embed_tokens.weight"] = even(of("model.embed_tokens.weight"), config.vocab_size)
    out["model.norm.weight"] = same("model.norm.weight")
    if not config.tie_word_embeddings:
        out["lm_head.weight"] = even(of("lm_head.weight"), config.vocab_size)
    for layer in (f"model.layers.{i}." for i in range(config.num_layers)):
        for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
            sizes = models[0].get_submodule(layer + "self_attn.qkv_proj").sizes
            q, k, v = zip(*(x.split(sizes) for x in of(f"{layer}self_attn.qkv_proj.{kind}")), strict=True)
            out[f"{layer}self_attn.q_proj.{kind}"] = by_heads(q, q_heads, config.num_heads * d, d)
            out[f"{layer}self_attn.k_proj.{kind}"] = by_heads(k, kv_heads, config.num_kv_heads * d, d)
            out[f"{layer}self_attn.v_proj.{kind}"] = by_heads(v, kv_heads, config.num_kv_heads * d, d)
        o = of(layer + "self_attn.o_proj.weight")
        out[layer + "self_attn.o_proj.weight"] = by_heads(o, q_heads, config.num_heads * d, d, dim=1)
        gate, up = zip(*(x.chunk(2) for x in of(layer + "mlp.gate_up_proj.weight")), strict=True)
        out[layer + "mlp.gate_proj.weight"] = even(gate, config.intermediate_size)
        out[layer + "mlp.up_proj.weight"] = even(up, config.intermediate_size)
        out[layer + "mlp.down_proj.weight"] = even(of(layer + "mlp.down_proj.weight"), config.intermediate_size, dim=1)
        norms = ["input_layernorm", "post_attention_layernorm"]
        norms += ["self_attn.q_norm", "self_attn.k_norm"] if config.qk_norm else []
        out |= {f"{layer}{norm}.weight": same(f"{layer}{norm}.weight") for norm in norms}
    return out


@over_models
@over_ranks
def test_the_shards_put_together_are_the_checkpoint(checkpoint, loaded, name, ranks):
    whole, want = put_together([model for model, _ in loaded(name, ranks)]), tensors(checkpoint(name))
    assert whole.keys() == want.keys()
    for key, x in want.items():
        assert torch.equal(whole[key], x), key


@over_models
@over_ranks
def test_loading_whole_tensors_first_gives_the_same_parameters(checkpoint, loaded, name, ranks):
    for rank in range(ranks):
        model, _ = load_then_shard(checkpoint(name), TPGroup(rank, ranks))
        for (path, mine), (_, other) in zip(
            loaded(name, ranks)[rank][0].named_parameters(), model.named_parameters(), strict=True
        ):
            assert torch.equal(mine, other), path


# --- what is read


def slice_numbers(key, shape, config, rank, ranks):
    """How many numbers of a checkpoint tensor this rank has any use for."""
    heads = HeadLayout.of(config.num_heads, config.num_kv_heads, rank, ranks)
    if "norm" in key:
        return count(shape)
    if "q_proj" in key:
        return count(shape) // config.num_heads * sum(q is not None for q in heads.q_heads)
    if "k_proj" in key or "v_proj" in key:
        return count(shape) // config.num_kv_heads * len(set(heads.kv_heads))
    if "o_proj" in key:
        return count(shape) // config.num_heads * sum(q is not None for q in heads.q_heads)
    dim = 1 if "down_proj" in key else 0
    return count(shape) // shape[dim] * sum(n for _, _, n in split_evenly(shape[dim], rank, ranks)[1])


@over_models
@over_ranks
def test_a_rank_reads_exactly_the_bytes_of_its_slices(checkpoint, loaded, name, ranks):
    config, whole = ModelConfig.from_folder(checkpoint(name)), tensors(checkpoint(name))
    for rank, (_, report) in enumerate(loaded(name, ranks)):
        want = sum(slice_numbers(key, x.shape, config, rank, ranks) for key, x in whole.items())
        assert report.bytes_read == 4 * want


@pytest.mark.parametrize(("name", "ranks"), [("qwen2", 1), ("qwen2", 2), ("qwen3", 2), ("qwen3", 4), ("llama", 2)])
def test_together_the_ranks_read_the_checkpoint_once_and_the_norms_once_each(checkpoint, loaded, name, ranks):
    whole = tensors(checkpoint(name))
    norms = sum(x.nbytes for key, x in whole.items() if "norm" in key)
    assert sum(report.bytes_read for _, report in loaded(name, ranks)) == (
        sum(x.nbytes for x in whole.values()) + (ranks - 1) * norms
    )


@pytest.mark.parametrize(("name", "ranks", "copies"), [("qwen2", 4, 2), ("llama", 4, 2)])
def test_with_more_ranks_than_kv_heads_the_copies_are_read_too(checkpoint, loaded, name, ranks, copies):
    whole = tensors(checkpoint(name))
    norms = sum(x.nbytes for key, x in whole.items() if "norm" in key)
    kv = sum(x.nbytes for key, x in whole.items() if "k_proj" in key or "v_proj" in key)
    assert sum(report.bytes_read for _, report in loaded(name, ranks)) == (
        sum(x.nbytes for x in whole.values()) + (ranks - 1) * norms + (copies - 1) * kv
    )


@over_models
def test_loading_whole_tensors_first_reads_everything_on_every_rank(checkpoint, name):
    total = sum(x.nbytes for x in tensors(checkpoint(name)).values())
    for rank in range(2):
        assert load_then_shard(checkpoint(name), TPGroup(rank, 2))[1].bytes_read == total


class SpyFile:
    """An open safetensors file that writes down which slice it is asked for."""

    def __init__(self, x):
        self.x, self.asked = x, []

    def get_slice(self, name):
        return self

    def get_shape(self):
        return list(self.x.shape)

    def __getitem__(self, index):
        self.asked.append(index)
        return self.x[index]


@pytest.mark.parametrize(("dim", "asked"), [(0, slice(2, 5)), (1, (slice(None), slice(2, 5)))])
def test_the_file_is_asked_for_the_slice_and_nothing_else(dim, asked):
    file, report = SpyFile(torch.arange(60.0).view(6, 10)), LoadReport()
    assert torch.equal(CheckpointTensor(file, "w", report).read(dim, 2, 5), file.x.narrow(dim, 2, 3))
    assert file.asked == [asked]
    assert report.bytes_read == 4 * file.x.narrow(dim, 2, 3).numel()


def test_what_is_held_beside_the_parameters_is_a_piece_and_shrinks_with_the_ranks(checkpoint, loaded):
    embedding = 1009 * 128 * 4
    assert loaded("llama", 1)[0][1].held_bytes == embedding
    assert loaded("llama", 4)[0][1].held_bytes == -(-1009 // 4) * 128 * 4
    total = sum(x.nbytes for x in tensors(checkpoint("llama")).values())
    assert load_then_shard(checkpoint("llama"), TPGroup(0, 4))[1].held_bytes == total


@over_models
@over_ranks
def test_every_tensor_is_in_the_report_once(checkpoint, loaded, name, ranks):
    for _, report in loaded(name, ranks):
        assert sorted(report.tensors) == sorted(tensors(checkpoint(name)))


@pytest.mark.parametrize(("name", "ranks"), [("qwen2", 2), ("qwen3", 2), ("qwen3", 4), ("llama", 2)])
def test_a_rank_keeps_1_over_r_of_the_parameters_and_all_norms(checkpoint, loaded, name, ranks):
    """Exactly, but for the rows that pad V and F to a multiple of R."""
    config, whole = ModelConfig.from_folder(checkpoint(name)), tensors(checkpoint(name))
    norms = sum(x.nbytes for key, x in whole.items() if "norm" in key)
    rest = sum(x.nbytes for x in whole.values()) - norms
    ends = 1 if config.tie_word_embeddings else 2
    padding = (-config.vocab_size % ranks) * ends + 3 * config.num_layers * (-config.intermediate_size % ranks)
    for model, _ in loaded(name, ranks):
        resident = sum(param.nbytes for param in model.parameters())
        assert resident == norms + (rest + 4 * padding * config.hidden_size) // ranks


# --- dtypes and devices


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_have_the_dtype_that_was_asked_for(checkpoint, loaded, dtype):
    model, report = load_model(checkpoint("qwen2"), TPGroup(1, 2), dtype)
    assert report.bytes_read == loaded("qwen2", 2)[1][1].bytes_read
    for param, wide in zip(model.parameters(), loaded("qwen2", 2)[1][0].parameters(), strict=True):
        assert torch.equal(param, wide.to(dtype))


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_every_floating_type_is_a_weight(copy, dtype):
    folder = copy("llama")
    rewrite(folder, lambda x: x.update({name: y.to(getattr(torch, dtype)) for name, y in x.items()}))
    want = tensors(folder)[NORM].float()
    assert torch.equal(load_model(folder, TPGroup())[0].model.norm.weight, want)


def test_loading_leaves_the_default_dtype_alone(checkpoint):
    load_model(checkpoint("qwen2"), TPGroup(0, 2), torch.bfloat16)
    assert torch.get_default_dtype() == torch.float32


def test_a_refused_checkpoint_leaves_the_default_dtype_alone(copy):
    folder = copy("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 3}))
    with pytest.raises(ValueError, match="num_attention_heads=8 is not a multiple of num_key_value_heads=3"):
        load_model(folder, TPGroup(), torch.bfloat16)
    assert torch.get_default_dtype() == torch.float32


def test_nothing_wants_a_gradient(loaded):
    assert not any(param.requires_grad for param in loaded("qwen3", 1)[0][0].parameters())


# --- checkpoints in several files, and what some of them carry


@over_models
def test_a_checkpoint_in_several_files_is_the_same_checkpoint(loaded, name, tmp_path):
    folder = save_random(name, tmp_path, max_shard_size="200KB")
    assert len(checkpoint_files(folder)) > 1
    for rank in range(2):
        model, report = load_model(folder, TPGroup(rank, 2))
        want, want_report = loaded(name, 2)[rank]
        assert report.bytes_read == want_report.bytes_read
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), want.parameters(), strict=True))


def test_without_an_index_all_safetensors_count(tmp_path):
    folder = save_random("llama", tmp_path, max_shard_size="200KB")
    want = tensors(folder).keys()
    (folder / "model.safetensors.index.json").unlink()
    assert load_model(folder, TPGroup())[1].tensors != []
    assert set(load_model(folder, TPGroup())[1].tensors) == set(want)


@pytest.mark.parametrize("stray", ["adapter_model.safetensors", "consolidated.safetensors", "other.safetensors"])
@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "200KB"}], ids=["one file", "an index"])
def test_other_files_beside_the_checkpoint_are_left_alone_and_named(tmp_path, stray, shards):
    folder = save_random("llama", tmp_path, **shards)
    save_file({NORM: torch.ones(1)}, folder / stray)
    with pytest.warns(UserWarning, match=f"{stray} left alone; not part of this checkpoint"):
        model, report = load_model(folder, TPGroup())
    assert report.notes == [f"{folder}: {stray} left alone; not part of this checkpoint"]
    assert len(model.model.norm.weight) == 128


def test_only_rank_0_says_it(copy, recwarn):
    folder = copy("llama")
    save_file({"lora": torch.ones(1)}, folder / "adapter_model.safetensors")
    assert load_model(folder, TPGroup(1, 2))[1].notes
    assert not recwarn.list


def test_stored_inverse_frequencies_are_tolerated(copy):
    folder = copy("llama")
    rewrite(folder, lambda x: x.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert not any("inv_freq" in name for name in load_model(folder, TPGroup())[1].tensors)
