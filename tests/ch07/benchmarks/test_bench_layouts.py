"""bench_layouts without GPUs: the planner beside a file, what is refused, and that every layout of two ranks runs and agrees."""

import csv
import os

import pytest

from ch07_sglang_radix.benchmarks import bench_layouts
from ch07_sglang_radix.benchmarks.bench_layouts import OPTIONS, _others, _planned, planned
from tests import warm
from tests.anatomy import ROOT

MODULE = "ch07_sglang_radix.benchmarks.bench_layouts"


def test_the_winner_of_each_workload_is_compared_with_the_planner_s(tmp_path, capsys):
    path = tmp_path / "bench_layouts.csv"
    rows = [("tp4", "D", 2.3), ("dp4", "D", 5.3), ("tp4", "32k", 1.0), ("dp4", "32k", 0.4), ("tp4", "start", 9.0)]
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(("model", "gpus", "layout", "workload", "value"))
        out.writerows(("Qwen2.5-7B", 4, *row) for row in rows)
    planned(path)
    assert "The planner names the winner in 1 of 2 rows" in capsys.readouterr().out


@pytest.mark.parametrize("ranks", OPTIONS)
def test_the_planner_knows_every_layout(ranks):
    for layout in OPTIONS[ranks]:
        model = "Qwen3-30B-A3B, 24 layers" if "ep" in layout else "Qwen2.5-7B"
        for row in bench_layouts.ROWS:
            assert _planned(model, layout, row) > 0, (layout, row)


def test_rows_of_the_same_layout_and_workload_are_replaced_and_others_kept(tmp_path):
    path = tmp_path / "bench_layouts.csv"
    path.write_text("model,layout,workload,value\na,tp4,D,1\na,tp4,C,2\na,dp4,D,3\nb,tp4,D,4\n", encoding="utf-8")
    new = {"model": "a", "layout": "tp4", "workload": "D"}
    assert [row["value"] for row in _others(path, [new])] == ["2", "3", "4"]
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
