"""The comparison of server and engine: what it says when there is no server, and what it leaves behind."""

import csv
from argparse import Namespace

import pytest

from ch07_sglang_radix.benchmarks.bench_server_overhead import Run, ServerSide, load_of, measured, record

ARGS = {
    "model_path": None, "device": "cpu", "tp_size": 1, "concurrency": 4, "mem_fraction_static": None, "requests": 8,
    "prompt_tokens": 16, "new_tokens": 6, "stream": True,
}  # fmt: skip


def test_a_server_that_does_not_start_is_quoted(capfd):
    with pytest.raises(ValueError, match="the server ended before it was ready, exit code 1"):
        ServerSide(Namespace(**ARGS | {"tp_size": 0}))
    assert "error: tp_size=0 must be at least 1" in capfd.readouterr().err


def runs(streams=True):
    made = {}
    for name, seconds in (("Engine", (2.0, 1.0, 4.0)), ("server", (2.5, 5.0, 2.0))):
        made[name] = [Run(100, one, cpu={"main": one / 2, "client": 0.25}) for one in seconds]
        for run in made[name]:
            run.first, run.between = ([0.5, 0.1, 0.2], [0.004]) if streams else ([], [])
    return made


def test_a_row_says_what_was_measured_and_on_what(tmp_path):
    path = tmp_path / "rows.csv"
    record(load_of(Namespace(**ARGS)) | measured(runs()), path)
    (row,) = csv.DictReader(path.open())
    assert [row[name] for name in ("model", "at once", "prompt tokens", "new tokens", "rounds")] == [
        "tiny-qwen", "4", "16", "6", "3",
    ]  # fmt: skip
    assert (float(row["Engine tokens/s"]), float(row["server tokens/s"])) == (50, 40)
    assert (float(row["server lowest"]), float(row["server highest"])) == (20, 50)
    assert (float(row["server first ms"]), float(row["server between ms"])) == (200, 4)
    assert (float(row["main CPU s"]), float(row["wall s"])) == (1.25, 2.5)
    assert row["device"]
    assert row["date"]


def test_a_file_of_something_else_is_left_alone(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("model,answer\nm,42\n")
    with pytest.raises(ValueError, match="holds other columns"):
        record(load_of(Namespace(**ARGS)) | measured(runs()), path)
    assert path.read_text() == "model,answer\nm,42\n"


def test_a_load_has_one_row_and_other_loads_keep_theirs(tmp_path):
    path = tmp_path / "rows.csv"
    many, few = Namespace(**ARGS | {"concurrency": 64}), Namespace(**ARGS | {"stream": False})
    for args in (many, few, many):
        record(load_of(args) | measured(runs(args.stream)), path)
    rows = list(csv.DictReader(path.open()))
    assert [(row["at once"], row["streams"]) for row in rows] == [("64", "True"), ("4", "False")]
    assert rows[1]["server first ms"] == "", "without a stream nobody sees a first token"
