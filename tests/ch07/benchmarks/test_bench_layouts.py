"""bench_layouts without GPUs: the planner beside a file, what is refused, and that every layout of two ranks runs and agrees."""

import csv
import os

import pytest

from ch07_sglang_radix.benchmarks import bench_layouts
from ch07_sglang_radix.benchmarks.bench_layouts import OPTIONS, _others, _planned, planned
from common.teaching.report import this_device
from tests import warm
from tests.anatomy import ROOT

MODULE = "ch07_sglang_radix.benchmarks.bench_layouts"


H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def said(tmp_path, capsys):
    """What is printed of rows of a file: (layout, workload, value) of one model on four cards."""

    def of(rows: list[tuple], model: str = "Qwen2.5-7B", device: str = H100) -> str:
        path = tmp_path / "bench_layouts.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            out = csv.writer(file)
            out.writerow(("model", "gpus", "layout", "workload", "value", "device"))
            out.writerows((model, 4, *row, device) for row in rows)
        planned(path)
        return capsys.readouterr().out

    return of


def test_the_winner_of_each_workload_is_compared_with_the_planner_s(said):
    rows = [("tp4", "D", 2.3), ("dp4", "D", 5.3), ("tp4", "32k", 1.0), ("dp4", "32k", 0.4), ("tp4", "start", 9.0)]
    assert "The planner names the winner in 1 of 2 rows, 0 ties" in said(rows)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((0.32, 0.33, 0.78), "in 0 of 1 rows, 1 tie"), ((0.33, 0.32, 0.78), "in 0 of 1 rows, 1 tie"),
        ((0.32, 0.32, 0.78), "in 1 of 1 rows, 0 ties"), ((0.33, 0.34, 0.31), "in 0 of 1 rows, 0 ties"),
    ],
)  # fmt: skip
def test_equal_bounds_name_no_winner_unless_what_was_measured_is_equal_too(said, values, words):
    """A long prompt touches all experts: columns and whole experts have one bound, and rows that travel a longer one."""
    layouts = ("tp4", "tp4, ep4", "tp4, attn-dp4, ep4")
    rows = [(layout, "32k", value) for layout, value in zip(layouts, values, strict=True)]
    out = said(rows, "Qwen3-30B-A3B, 24 layers")
    assert words in out
    assert "tp4 or tp4, ep4" in out


def test_the_order_of_the_rows_changes_nothing(tmp_path, capsys):
    lines = (ROOT / "figures/bench_layouts.csv").read_text(encoding="utf-8").splitlines()
    told = []
    for number, rows in enumerate((lines[1:], lines[:0:-1])):
        path = tmp_path / f"{number}.csv"
        path.write_text("\n".join([lines[0], *rows]), encoding="utf-8")
        planned(path)
        told.append(sorted(capsys.readouterr().out.splitlines()))
    assert told[0] == told[1]


def test_a_bound_is_of_the_card_that_was_measured(said):
    rows = [("tp4", "D", 2.3), ("dp4", "D", 5.3)]
    assert " 4 H200 " in said(rows, device="NVIDIA H200")
    assert " 4 L40S " in said(rows, device="NVIDIA L40S")
    h100, h200 = (_planned("Qwen2.5-7B", "dp4", bench_layouts.ROWS[0], gpu) for gpu in ("H100", "H200"))
    assert h100 / h200 == pytest.approx(4.8 / 3.35, rel=0.01)
    with pytest.raises(ValueError, match="device='NVIDIA T4' is unknown to the planner; it knows H200, H100"):
        said(rows, device="NVIDIA T4")


@pytest.mark.parametrize("ranks", OPTIONS)
def test_the_planner_knows_every_layout(ranks):
    for layout in OPTIONS[ranks]:
        model = "Qwen3-30B-A3B, 24 layers" if "ep" in layout else "Qwen2.5-7B"
        for row in bench_layouts.ROWS:
            assert _planned(model, layout, row, "H100") > 0, (layout, row)


def test_rows_of_the_same_layout_and_workload_are_replaced_and_others_kept(tmp_path):
    path = tmp_path / "bench_layouts.csv"
    here = this_device()
    lines = ["model,layout,workload,device,value", f"a,tp4,D,{here},1", f"a,tp4,C,{here},2", f"a,dp4,D,{here},3"]
    lines += [f"b,tp4,D,{here},4", "a,tp4,D,another,5"]
    path.write_text("\n".join(lines), encoding="utf-8")
    new = {"model": "a", "layout": "tp4", "workload": "D"}
    assert [row["value"] for row in _others(path, [new])] == ["2", "3", "4", "5"]
    assert _others(tmp_path / "none.csv", [new]) == []


def test_two_ranks_agree_under_every_layout(tmp_path):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    code, _, said = warm.Torchrun(["-m", MODULE, "--check"], 2, ROOT, env, tmp_path).finish(300)
    assert code == 0, said  # it is another one if tokens differ


def test_a_layout_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("sys.argv", ["bench_layouts", "--layouts", "tp3"])
    with pytest.raises(ValueError, match=r"^--layouts tp3: on 2 ranks there are tp2, pp2"):
        bench_layouts.main()
