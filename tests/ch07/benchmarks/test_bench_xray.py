"""What an open page costs: that both are measured, and that telling of every step means every step."""

import sys

from ch07_sglang_radix.benchmarks import bench_xray


def test_it_measures_with_and_without_a_page(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_xray", "--rounds", "1", "--requests", "4"])
    bench_xray.main()
    rows = {line.split("  ")[1].strip(): line.split() for line in capsys.readouterr().out.splitlines()[1:]}
    assert rows.keys() == {"closed", "open", "every step"}
    steps, told = rows["every step"][-2:]
    assert steps == told
    assert (rows["closed"][-1], rows["closed"][-3]) == ("0", "0.00")
    assert 0 < int(rows["open"][-1]) <= int(rows["open"][-2])
