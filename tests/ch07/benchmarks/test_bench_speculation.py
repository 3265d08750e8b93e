"""The benchmark of verify steps, as far as a CPU goes: acceptance is what was imposed, the rest is what an engine does."""

import sys

import numpy as np
import pytest
import torch

from ch07_sglang_radix.benchmarks import bench_speculation
from ch07_sglang_radix.benchmarks.bench_speculation import RATES, STEPS, Imposed, expected_tokens
from ch07_sglang_radix.engine import Engine
from common.models.published_configs import published_config


def test_the_expected_tokens_are_those_of_the_rates():
    assert expected_tokens((0.5,), 3) == 1 + 0.5 + 0.25 + 0.125
    assert expected_tokens((0.5, 0.2), 3) == pytest.approx(1 + 0.5 + 0.1 + 0.02)
    assert expected_tokens((1.0,), 4) == 5


@pytest.mark.parametrize(("rates", "tokens"), [((1.0,), 5), ((0.0,), 1), ((1.0, 1.0, 0.0), 3)])
def test_a_step_brings_what_is_imposed_whatever_the_drafter_says(rates, tokens):
    params = {"max_new_tokens": 31, "ignore_eos": True}
    with Engine(device="cpu", speculative_algorithm="STANDALONE", speculative_num_steps=4, speculative_stand_down=False,
                max_total_tokens=1024) as engine:  # fmt: skip
        imposed = Imposed(engine, rates)
        told = engine.generate(input_ids=[[5, 6, 7], [8, 9]], sampling_params=params)
        speculation = engine.scheduler.speculation
        assert all(len(one["output_ids"]) == 31 for one in told)
        assert speculation.sequences == 2 * -(-30 // tokens)
        imposed.verifier.receive = imposed._receive


def test_random_heads_have_the_target_s_shape(tmp_path):
    folder = bench_speculation.random_eagle("Qwen2.5-0.5B", {"vocab_size": 4096}, tmp_path / "eagle")
    from safetensors import safe_open  # noqa: PLC0415

    with safe_open(folder / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118, not a dict
    d = published_config("Qwen2.5-0.5B").hidden_size
    assert shapes["fc.weight"] == [d, 2 * d]
    assert shapes["layers.0.self_attn.k_proj.weight"] == [128, d]


def test_both_drafters_are_measured_against_their_bound(tmp_path, monkeypatch):
    changes = {"num_hidden_layers": 1, "vocab_size": 512, "hidden_size": 56, "intermediate_size": 64}
    tiny = ("Qwen2.5-0.5B", changes)
    monkeypatch.setitem(bench_speculation.PARTS, "small", (tiny, tiny, 6, 12))
    monkeypatch.setattr(bench_speculation, "timed", lambda engine, call, calls=1: (call(), 1.0)[1])
    monkeypatch.setattr(np.random, "default_rng", lambda seed, make=np.random.default_rng: _Below(make(seed)))
    written = []
    monkeypatch.setattr(bench_speculation, "write_csv", lambda rows, path: written.extend(rows))
    monkeypatch.setattr(
        sys, "argv", ["bench", "--part", "small", "--batches", "2", "--device", "cpu", "--out", str(tmp_path)]
    )
    bench_speculation.main()
    assert [row["drafter"] for row in written] == ["STANDALONE", "EAGLE"]
    for row in written:
        assert 1 <= row["tokens a step"] <= STEPS + 1
        assert row["expected"] == round(expected_tokens(RATES[row["drafter"]], STEPS), 3)
        assert row["bound ms a token"] == pytest.approx(2 / row["tokens a step"], rel=1e-3)


class _Below:
    """Token ids of a small vocabulary."""

    def __init__(self, rng):
        self.rng = rng

    def integers(self, low, high, size):
        return self.rng.integers(low, min(high, 512), size)

    def random(self, size):
        return self.rng.random(size)


def test_without_a_gpu_large_shapes_are_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench"])
    with pytest.raises(ValueError, match="use --part small"):
        bench_speculation.main()
