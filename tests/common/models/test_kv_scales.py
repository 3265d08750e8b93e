"""The scales of fp8 pages in a checkpoint: found under every name, refused by name, and used."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.executor import Executor
from common.models.kv_scales import take_kv_scales
from common.models.weights import load_model
from common.parallel_state import TPGroup
from common.tiny_qwen import TINY_QWEN_PATH

ATTENTION = "model.layers.1.self_attn"
LAYERS = 4


@pytest.fixture
def with_scales(tmp_path):
    """(tensors to add) -> the bundled model with these."""

    def make(scales):
        folder = shutil.copytree(TINY_QWEN_PATH, tmp_path / "model", dirs_exist_ok=True)
        path = folder / "model.safetensors"
        save_file(load_file(path) | {name: torch.as_tensor(x) for name, x in scales.items()}, path)
        return folder

    return make


def scales_of(folder):
    return load_model(folder, TPGroup(0, 1))[1].kv_scales


@pytest.mark.parametrize(
    ("names", "want"),
    [
        ({}, (1.0, 1.0)),
        ({"k_scale": 0.5, "v_scale": 0.25}, (0.5, 0.25)),
        ({"k_proj.k_scale": 0.5, "v_proj.v_scale": 0.25}, (0.5, 0.25)),
        ({"attn.k_scale": 0.5, "attn.v_scale": 0.25}, (0.5, 0.25)),
        ({"kv_scale": 0.5}, (0.5, 0.5)),
        ({"k_scale": 0.5}, (0.5, 0.5)),
        ({"v_scale": 0.25}, (0.25, 0.25)),
        ({"k_scale": 0.5, "attn.k_scale": 0.5, "v_scale": [0.25]}, (0.5, 0.25)),
    ],
    ids=str,
)
def test_every_name(names, want, with_scales):
    found = scales_of(with_scales({f"{ATTENTION}.{name}": x for name, x in names.items()}))
    assert len(found) == LAYERS
    assert found == [want if layer == 1 else (1.0, 1.0) for layer in range(LAYERS)]


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        ({"k_scale": float("nan")}, r"self_attn.k_scale is nan; a scale is finite and above zero"),
        ({"v_scale": float("inf")}, r"self_attn.v_scale is inf; a scale"),
        ({"kv_scale": 0.0}, r"self_attn.kv_scale is 0.0; a scale"),
        ({"k_scale": -1.0}, r"self_attn.k_scale is -1.0; a scale"),
        ({"k_scale": [0.5, 0.5]}, r"self_attn.k_scale is \[2\] of F32; pages of fp8 take one"),
        ({"k_scale": 3}, r"self_attn.k_scale is \[\] of I64; pages"),
        ({"k_scale": 0.5, "kv_scale": 0.25}, r"self_attn.kv_scale is 0.25, and another name says 0.5; keep one"),
        ({"q_scale": 0.5}, r"1 unexpected: .*q_scale"),
    ],
    ids=str,
)
def test_what_cannot_be_a_scale_is_refused_by_name(names, complaint, with_scales):
    folder = with_scales({f"{ATTENTION}.{name}": x for name, x in names.items()})
    with pytest.raises(ValueError, match=complaint):
        scales_of(folder)


def test_only_its_names_leave_the_checkpoint():
    found = {"model.layers.0.self_attn.k_proj.weight": None, "model.layers.9.self_attn.k_scale": None}
    assert take_kv_scales(found, 2, "here") == {}
    assert len(found) == 2


def test_the_pages_are_divided_by_them(with_scales):
    """Numbers beyond 448 are cut off without a scale, and not with one."""
    folder = with_scales({f"{ATTENTION}.k_scale": 8.0, f"{ATTENTION}.v_scale": 2.0})
    cache = Executor(str(folder), "cpu", kv_cache_dtype="fp8_e4m3", max_total_tokens=64, tp=TPGroup(0, 1)).kv_cache
    assert cache.scales == [(8.0, 2.0) if layer == 1 else (1.0, 1.0) for layer in range(LAYERS)]
    x = torch.full((1, *cache.k.shape[3:]), 832.0)
    for layer, want in ((0, (448.0, 448.0)), (1, (832.0, 832.0))):
        k, v = cache.rounded(layer, x, x)
        assert (k.unique().item(), v.unique().item()) == want
    plain = Executor(str(folder), "cpu", kv_cache_dtype="bf16", max_total_tokens=64, tp=TPGroup(0, 1)).kv_cache
    assert set(plain.scales) == {(1.0, 1.0)}


def test_no_scales_are_made_for_layers_that_the_files_have_not(with_scales):
    folder = with_scales({})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"num_hidden_layers": 10**30, "layer_types": None}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=r"num_hidden_layers=10+, but the weight files have 4 layers"):
        scales_of(folder)
