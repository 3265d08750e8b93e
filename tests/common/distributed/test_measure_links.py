"""What messages cost here: the measurement itself, not how long anything takes."""

import sys

import pytest

from common.distributed import measure_links
from common.distributed.cost_model import Link, Sample
from common.distributed.machines import Machine, Speed
from common.distributed.measure_links import OPS, link_between, measure_here, report, this_machine
from common.teaching.report import write_json

SIZES, MEMORY = (256, 65_536), (1 << 20, 1 << 22)


def test_every_operation_is_measured_with_every_size():
    samples, speeds = measure_here([2], turns=1, sizes=SIZES, memory=MEMORY)
    assert [(s.op, s.ranks, s.nbytes) for s in samples] == [(op, 2, nbytes) for op in OPS for nbytes in SIZES]
    assert all(s.seconds > 0 for s in samples)
    assert [(speed.ranks, speed.nbytes) for speed in speeds["reading"]] == [(r, n) for r in (1, 2) for n in MEMORY]
    assert [speed.ranks for speed in speeds["float32"]] == [1, 2]


def modelled(link: Link, *ranks: int) -> list[Sample]:
    return [Sample(op, r, 4**k, link.seconds(op, 4**k, r)) for r in ranks for op in OPS for k in range(4, 12)]


def test_the_common_link_is_of_the_ranks_that_have_a_core_each(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    link, crowded = Link(50e-6, 2e9), Link(900e-6, 1e9)
    found = link_between([*modelled(link, 2), *modelled(crowded, 3, 4)])
    assert (found.latency_s, found.bytes_per_s) == (pytest.approx(link.latency_s), pytest.approx(link.bytes_per_s))
    assert link_between(modelled(crowded, 4)).latency_s == pytest.approx(crowded.latency_s), "if there are no others"


def test_the_report_tells_the_residual(capsys):
    samples = modelled(Link(50e-6, 2e9), 2)
    report(samples, Link(100e-6, 2e9))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "one link for all: 100 us a message, 2.00 GB/s"
    assert len(lines) == 1 + len(OPS)
    assert all("own fit    50 us  2.00 GB/s, off by   0 %" in line for line in lines[1:])
    assert not any(line.endswith("the common one by   0 %") for line in lines[1:])


def test_this_machine_is_one_host_whose_memory_all_share(tmp_path):
    link = Link(50e-6, 2e9)
    machine = this_machine({"reading": [Speed(1, 1, 1e9)], "float32": [Speed(1, 0, 1e9)]}, link)
    write_json(machine.to_json(), tmp_path / "machine.json")
    assert Machine.from_file(tmp_path / "machine.json") == machine
    assert machine.shared
    assert machine.link(4, 1) == link
    assert list(machine.flops) == ["float32"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--nproc", "1", "2"], "^--nproc 1: one rank has nobody to talk to"),
        (["--nproc", "2", "100000"], r"^--nproc 100000 would start 99999 processes; this machine takes \d+ ranks$"),
        (["--out", "nowhere/links.csv"], "^--out='nowhere/links.csv' must be a file in a folder that exists$"),
        (["--machine", "."], "^--machine='.' must be a file in a folder that exists$"),
    ],
)
def test_what_cannot_be_measured_or_kept_is_one_line_at_once(argv, words, monkeypatch):
    monkeypatch.setattr(measure_links, "measure_here", lambda *_: pytest.fail("it measures"))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(sys, "argv", ["measure_links", *argv])
    with pytest.raises(ValueError, match=words):
        measure_links.main()
