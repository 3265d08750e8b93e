"""The benchmark of adapters, as far as a CPU goes: a small model, one round."""

import sys

import pytest
import torch

from ch07_sglang_radix.benchmarks import bench_lora
from common.models.published_configs import published_shape


def test_steps_are_timed_in_turn_with_and_without_adapters(checkpoint):
    rows = bench_lora.steps(str(checkpoint("llama")), "cpu", [1, 3], rounds=1)
    names = ["no slots", "nobody", "one", "mixed", "half"]
    assert [(row["sequences"], row["adapters"]) for row in rows] == [(n, name) for n in (1, 3) for name in names]
    assert all(row["ms"] > 0 for row in rows)
    assert [row["share_of_no_slots"] for row in rows if row["adapters"] == "no slots"] == [1, 1]


def test_a_mixed_step_has_all_adapters_and_half_of_it_none():
    slots = bench_lora.slots_of(64)
    assert set(slots["mixed"].tolist()) == set(range(1, 9))
    assert (slots["half"] == 0).sum() == 32
    assert slots["nobody"] is None


def test_kernels_are_timed_for_the_four_products_of_a_layer():
    layers = bench_lora.linear_layers(published_shape("Qwen2.5-0.5B"), torch.device("meta"))
    assert {name: tuple(layer.weight.shape) for name, layer in layers.items()} == {
        "qkv_proj": (1152, 896), "o_proj": (896, 896), "gate_up_proj": (9728, 896), "down_proj": (896, 4864),
    }  # fmt: skip


@pytest.mark.parametrize("flags", [["--device", "cuda"], ["--part", "kernels"]])
def test_what_needs_a_gpu_says_so(monkeypatch, flags):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench_lora", *flags])
    with pytest.raises(ValueError, match="need an NVIDIA GPU, and there is none; use --device cpu"):
        bench_lora.main()
