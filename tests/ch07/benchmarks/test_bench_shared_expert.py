"""The shared expert beside the way of the rows: both forms are one layer, and the rounds become one line."""

import torch

from ch07_sglang_radix.benchmarks.bench_shared_expert import Layer, arrived, measure
from common.layers import moe
from common.layers.dispatch import set_out
from common.parallel_state import TPGroup

SHRINK = 64


def test_both_forms_give_the_same_and_leave_the_layer_as_it_is():
    layer = Layer(TPGroup(), 6, SHRINK)
    with torch.inference_mode():
        assert torch.equal(layer.forward(set_out), layer.forward(arrived))
    assert moe.set_out is set_out


def test_what_has_arrived_was_waited_for_at_once(monkeypatch):
    waits = []
    monkeypatch.setattr(
        "common.layers.dispatch.start_all_to_all", lambda x, *_: lambda: (waits.append(len(waits)), x)[1]
    )
    layer = Layer(TPGroup(), 6, SHRINK)
    layer.moe.shared_expert.register_forward_pre_hook(lambda *_: waits.append("shared"))
    with torch.inference_mode():
        layer.forward(set_out)
        layer.forward(arrived)
    assert waits == ["shared", 1, 2, "shared"]


def test_a_row_has_every_part_and_a_gain_between_its_quartiles():
    row = measure(TPGroup(), 6, rounds=3, shrink=SHRINK)
    assert (row["ranks"], row["tokens"]) == (1, 6)
    assert all(row[f"{name} ms"] > 0 for name in ("meanwhile", "afterwards", "way", "shared"))
    assert row["gain, 1st quartile"] <= row["gain"] <= row["gain, 3rd quartile"]
