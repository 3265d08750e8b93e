"""Each format over each number of ranks: what a rank holds of a quantized checkpoint is what it holds of the plain weights that its
codes stand for, bit by bit; in codes, too."""

import pytest
import torch

from common.models.quantized_tensors import codes_of, held_tensors
from common.models.weights import load_model
from common.parallel_state import TPGroup
from common.quantization import linear_methods
from common.quantization.method import LinearMethod
from tests.common.quantization.checkpoints import FORMATS, quantise_folder

over_ranks = pytest.mark.parametrize("ranks", [1, 2, 3, 4])


@pytest.fixture(scope="module")
def folders(checkpoint, tmp_path_factory):
    """folders(model, format) -> (quantized, plain)."""
    made = {}

    def get(model, name):
        if (model, name) not in made:
            target = tmp_path_factory.mktemp("quantized") / f"{model}-{name}"
            made[model, name] = quantise_folder(checkpoint(model), target, FORMATS[name])
        return made[model, name]

    return get


@over_ranks
@pytest.mark.parametrize("model", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_rank_holds_what_the_codes_stand_for(folders, name, model, ranks):
    quantized, plain = folders(model, name)
    for rank in range(ranks):
        got, report = load_model(quantized, TPGroup(rank, ranks))
        want, _ = load_model(plain, TPGroup(rank, ranks))
        want = dict(want.named_parameters())
        assert got.config.quantization
        for own, param in got.named_parameters():
            assert torch.equal(param, want[own]), own
        assert any("dequantised" in note for note in report.notes)


class Kept(LinearMethod):
    """Keeps codes and dequantises them at each product: what a kernel does at once."""

    name = "kept"

    @classmethod
    def takes(cls, scheme, device, dtype):
        return True

    def pack(self, layer, codes):
        self.codes = codes
        for name, x in zip(codes._fields, codes, strict=True):
            layer.register_buffer(f"codes_{name}", x, persistent=False)

    def apply(self, layer, x, bias):
        return torch.nn.functional.linear(x, self.codes.dequantise(), bias)


@over_ranks
@pytest.mark.parametrize("name", FORMATS)
def test_a_rank_may_keep_the_codes(folders, name, ranks, monkeypatch):
    monkeypatch.setitem(linear_methods.LINEAR_METHODS, "weight_only", (Kept,))
    quantized, plain = folders("qwen2", name)
    for rank in range(ranks):
        got, report = load_model(quantized, TPGroup(rank, ranks), quantized_compute="weight_only")
        want, _ = load_model(plain, TPGroup(rank, ranks))
        layers = codes_of(got)
        assert len(layers) == 12
        assert "kept as codes (kept)" in "".join(report.notes)
        for own, layer in layers.items():
            assert torch.equal(layer.method.codes.dequantise(), want.get_parameter(f"{own}.weight")), own
        held = held_tensors(got)
        assert f"{next(iter(layers))}.codes_q" in held
        assert f"{next(iter(layers))}.weight" not in held
