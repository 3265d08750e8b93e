"""The benchmarks of experts, as far as a CPU goes: small layers, few rounds, and that the bytes said are those of the formula."""

import sys

import pytest
import torch

from ch07_sglang_radix.benchmarks import bench_expert_models, bench_experts
from ch07_sglang_radix.benchmarks.bench_experts import LAYERS, Layer, LayerShape, forms, touched
from common.models.config import ModelConfig
from tests.oracle import save_random

SMALL = LayerShape("small", 6, 2, 16, 8, torch.float32)


def test_both_forms_are_timed_in_turn_and_give_the_same():
    rows = forms(SMALL, (1, 5), rounds=2, threads=1)
    assert [(row["tokens"], row["form"]) for row in rows] == [(1, "loop"), (1, "grouped"), (5, "loop"), (5, "grouped")]
    assert all(float(row["error"]) < 1e-5 for row in rows)
    assert all(row["of loop"] == 1 for row in rows[::2])
    assert all(row["experts read"] == 2 for row in rows[:2])  # one token's


def test_experts_that_are_read_are_those_somebody_chose():
    layer = Layer(SMALL, torch.device("cpu"))
    assert touched(layer.inputs(1)) == 2
    assert 2 < touched(layer.inputs(3)) <= 6
    assert touched(layer.inputs(200)) == 6


@pytest.mark.parametrize("shape", LAYERS, ids=lambda shape: shape.name)
def test_layers_have_the_published_shapes(shape):
    from common.models.published_configs import published_config  # noqa: PLC0415

    config = published_config(shape.name)
    experts = getattr(config, "num_experts", None) or config.n_routed_experts
    assert (shape.experts, shape.top) == (experts, config.num_experts_per_tok)
    assert (shape.hidden, shape.width) == (config.hidden_size, config.moe_intermediate_size)
    assert shape.expert_bytes() == 2 * 3 * shape.hidden * shape.width


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("module", "args"),
    [
        (bench_experts, ["--part", "kernels"]), (bench_experts, ["--part", "tune"]), (bench_experts, ["--part", "latent"]),
        (bench_expert_models, []),
    ],
)  # fmt: skip
def test_without_a_gpu_the_rest_says_so(module, args, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench", *args])
    with pytest.raises(ValueError, match="needs an NVIDIA GPU, and there is none"):
        module.main()


def test_a_whole_model_runs_and_reads_what_the_formula_says(tmp_path, monkeypatch):
    folder = save_random("qwen3_moe", tmp_path / "model")
    monkeypatch.setattr(sys, "argv", ["bench", "--tiny", "--model", str(folder), "--out", str(tmp_path)])
    for _ in range(2):  # rows of the same model are replaced
        bench_expert_models.main()
    lines = (tmp_path / "expert_models.csv").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 9
    config = ModelConfig.from_folder(str(folder))
    d, heads, layers = config.hidden_size, config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads), 3
    sparse, mixture = sum(config.mixture.sparse), config.mixture
    numbers = layers * (d * heads + 2 * d + 2 * config.head_dim) + d + config.vocab_size * d
    numbers += (layers - sparse) * 3 * d * config.intermediate_size
    numbers += sparse * (mixture.num_experts * d + 3 * mixture.router.top_k * d * mixture.intermediate_size)
    said = next(float(line.split(",")[5]) for line in lines if "MB read" in line)
    assert said == pytest.approx(4e-6 * numbers, rel=0.01)  # widths and vocabulary are padded to whole lines
