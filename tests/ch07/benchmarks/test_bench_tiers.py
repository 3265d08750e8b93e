"""The benchmark of tiers, as far as a CPU goes: a small model, one round."""

import sys

import pytest
import torch

from ch07_sglang_radix.benchmarks import bench_tiers


def test_a_prompt_is_timed_from_every_tier(checkpoint, tmp_path):
    rows = bench_tiers.measure(str(checkpoint("llama")), "cpu", 320, rounds=1, where=tmp_path, vocabulary=90)
    assert [row["first token from"] for row in rows] == ["computed", "device", "host", "disk"]
    assert all(row["ms"] > 0 and row["tokens"] == 320 for row in rows)
    assert not list(tmp_path.iterdir())


def test_steps_of_others_are_timed_while_a_prompt_comes_and_goes(checkpoint, tmp_path):
    rows = bench_tiers.measure_beside(
        str(checkpoint("llama")), "cpu", 320, rounds=1, where=tmp_path, vocabulary=90, most=300
    )
    assert [row["beside"] for row in rows] == ["nobody", "from host", "from files", "to files"]
    assert rows[0]["steps"] == bench_tiers.STEPS
    assert rows[0]["of nobody"] == 1
    assert all(row["lasts ms"] > 0 for row in rows)
    assert all(row["longest ms"] >= row["ms a step"] > 0 for row in rows if row["steps"])
    assert rows[2]["steps"] > 0, "files are read while others go on"
    assert not list(tmp_path.iterdir())


def test_what_needs_a_gpu_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench_tiers", "--device", "cuda"])
    with pytest.raises(ValueError, match="needs an NVIDIA GPU, and there is none; use --device cpu"):
        bench_tiers.main()
