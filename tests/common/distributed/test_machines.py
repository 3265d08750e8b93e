import json

import pytest

from common.distributed.cost_model import Link
from common.distributed.machines import GPUS, GPUS_A_HOST, Machine, Speed
from common.teaching.report import write_json

HERE = Machine(
    "here", 8 * 10**9, True, (Speed(1, 1 << 20, 80e9), Speed(1, 1 << 28, 20e9), Speed(2, 1 << 28, 15e9)),
    {"float32": (Speed(1, 0, 1e11), Speed(2, 0, 9e10))}, Link(50e-6, 2e9), Link(50e-6, 2e9), 1 << 20, "2026-11-26",
)  # fmt: skip


def test_a_machine_is_read_as_it_was_written(tmp_path):
    write_json(HERE.to_json(), tmp_path / "machine.json")
    assert Machine.from_file(tmp_path / "machine.json") == HERE


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
