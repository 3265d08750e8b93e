import json
import re

import pytest

from common.distributed.cost_model import Link
from common.distributed.machines import GPUS, GPUS_A_HOST, PUSH, Machine, Speed
from common.teaching.report import write_json
from tests.readme import ROOT

HERE = Machine(
    "here", 8 * 10**9, True, (Speed(1, 1 << 20, 80e9), Speed(1, 1 << 28, 20e9), Speed(2, 1 << 28, 15e9)),
    {"float32": (Speed(1, 0, 1e11), Speed(2, 0, 9e10))}, Link(50e-6, 2e9), Link(50e-6, 2e9), 1 << 20, "2026-11-26",
)  # fmt: skip


@pytest.mark.parametrize("machine", [HERE, Machine.of_gpus("H100")], ids=["measured", "GPUs"])
def test_a_machine_is_read_as_it_was_written(tmp_path, machine):
    write_json(machine.to_json(), tmp_path / "machine.json")
    assert Machine.from_file(tmp_path / "machine.json") == machine


def test_no_sum_over_nvlink_was_measured_quicker_than_it_is_planned():
    """Those of NOTES.md, by this repository's kernel, PyTorch's and NCCL; the quickest of each number of ranks is met."""
    text = (ROOT / "common/kernels/NOTES.md").read_text(encoding="utf-8")
    us, kb, more, more_kb = re.search(
        r"takes ([\d.]+) us up to (\d+) KB and ([\d.]+) us at (\d+) KB with `push`", text
    ).groups()
    measured = [(2, 1024 * int(kb), float(us)), (2, 1024 * int(more_kb), float(more))]
    table = text.partition("## Four GPUs")[2].partition("\n## ")[0]
    for nbytes, cells in re.findall(r"^\| ([\d,]+) \|(.*)\|$", table, re.MULTILINE):
        measured += [(4, int(nbytes.replace(",", "")), float(cell)) for cell in cells.split("|") if cell.strip()]
    assert len(measured) == 2 + 6 * 4 + 3 * 3
    link = Machine.of_gpus("H100").inside
    for ranks, nbytes, took in measured:
        assert 1e6 * link.seconds("all_reduce", nbytes, ranks) <= took * (1 + 1e-9), (ranks, nbytes)
    for sample in PUSH:
        assert (sample.ranks, sample.nbytes, pytest.approx(1e6 * sample.seconds)) in measured
        assert link.seconds(sample.op, sample.nbytes, sample.ranks) == pytest.approx(sample.seconds)


def test_only_sums_inside_a_host_over_nvlink_are_this_repository_s():
    h100, pcie = Machine.of_gpus("H100"), Machine.of_gpus("H100", "pcie")
    bare = Link(h100.inside.latency_s, h100.inside.bytes_per_s, h100.inside.start_s)
    assert h100.inside.seconds("all_gather", 1024, 4) == bare.seconds("all_gather", 1024, 4)
    assert h100.inside.seconds("all_reduce", 1024, 4) < bare.seconds("all_reduce", 1024, 4)
    assert not pcie.inside.sums
    assert not h100.link(16, 2).sums


def test_more_ranks_have_no_quicker_sum():
    link = Machine.of_gpus("H100").inside
    times = [link.seconds("all_reduce", 1024, ranks) for ranks in range(2, 17)]
    assert times == sorted(times)


def test_reading_is_as_fast_as_was_measured_nearest():
    assert HERE.bytes_per_s(3 << 20, 1) == 80e9
    assert HERE.bytes_per_s(1 << 29, 1) == 20e9
    assert HERE.bytes_per_s(1 << 20, 2) == 15e9, "the number of ranks counts first"
    assert HERE.bytes_per_s(1 << 29, 4) == 15e9
    assert HERE.flops_per_s("float32", 2) == 9e10


def test_a_group_on_several_hosts_shares_their_adapters():
    h100 = Machine.of_gpus("H100")
    assert h100.link(8, 1) == h100.inside
    across = h100.link(16, 2)
    assert across.bytes_per_s == 8 * 50e9, "eight adapters a host, and that is less than NVLink"
    assert h100.inside.latency_s < across.latency_s < h100.between.latency_s
    assert h100.link(2, 2) == h100.between


def test_over_ethernet_every_gpu_has_a_host_of_its_own():
    alone = Machine.of_gpus("H100", "ethernet")
    assert alone.ranks_a_host == 1
    assert Machine.of_gpus("H100").ranks_a_host == GPUS_A_HOST
    assert alone.between.bytes_per_s < Machine.of_gpus("H100", "pcie").inside.bytes_per_s


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_has_a_machine(name):
    machine = Machine.of_gpus(name)
    assert machine.bytes_per_s(1, 1) == GPUS[name].bytes_per_s
    assert not machine.shared


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("H1000",), "gpu='H1000' is unknown; use H200, H100"),
        (("L4", "nvlink"), "an L4 has no NVLink; use --interconnect pcie"),
        (("H100", "tin cans"), "interconnect='tin cans'"),
    ],
)
def test_what_is_in_no_table_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        Machine.of_gpus(*arguments)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"name": 1}', '"x"', json.dumps({"reading": [1], "flops": {}})])
def test_a_damaged_file_is_one_line(tmp_path, text):
    (tmp_path / "machine.json").write_text(text)
    with pytest.raises(ValueError, match="machine\\.json: not") as error:
        Machine.from_file(tmp_path / "machine.json")
    assert "\n" not in str(error.value)


def test_a_missing_file_says_how_it_is_made(tmp_path):
    with pytest.raises(FileNotFoundError, match="common\\.distributed\\.measure_links"):
        Machine.from_file(tmp_path / "none.json")
