"""The bound beside a measurement, on the bundled model: that both are there and the bytes are equal, not how long it takes."""

import re
import sys

import pytest
import torch

from common.distributed import check_plan
from common.distributed.cost_model import Link
from common.distributed.machines import Machine, Speed
from common.models.published_configs import model_shape
from common.planner.bounds import bound
from common.planner.choice import room_of
from common.planner.plan import Load, Way
from common.teaching.report import write_json
from tests.readme import ROOT

README = ROOT / "ch07_sglang_radix/parallelism/README.md"


def test_measured_layouts_stand_beside_their_bounds(monkeypatch, capsys, tmp_path):
    link, at_once = Link(1e-6, 1e12), (Speed(1, 1 << 24, 1e12),)
    dream = Machine("dream", 2**34, True, at_once, {"float32": (Speed(1, 0, 1e14),)}, link, link, 1 << 20)
    write_json(dream.to_json(), tmp_path / "m.json")
    monkeypatch.setattr(sys, "argv", ["check_plan", "--model", "bundled", "--machine", str(tmp_path / "m.json")])
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    check_plan.main()
    out = capsys.readouterr().out
    assert len(re.findall(r"^ +bundled +(tp1|tp2|pp2|dp2) +[18] +512 ", out, re.MULTILINE)) == 8
    assert "ok: weights and pages of rank 0 are those of the planner, to the byte" in out
    sums = r"tp2: an all-reduce takes [\d.]+ ms between .*\n.* a product, as in a layer: for 9 of them -?\d+ ms of the \d+ ms"
    assert re.search(sums, out)
    least = float(re.search(r"bundled: measured / bound is ([\d.]+) to", out)[1])
    assert least > 1, "no machine is as fast as that one"


def test_the_measured_table_has_today_s_bounds_and_stays_within_the_stated_factor():
    """The README's measurements are of the machine in figures/machine.json: whoever changes the planner's times finds out here
    what they are worth, and whoever measures the machine anew has to measure the table, too."""
    machine = Machine.from_file(ROOT / "figures/machine.json")
    number = r" +([\d.]+)"
    row = re.compile(rf"^  (\S+) +(tp1|tp2|pp2|dp2) +(\d+) +(\d+){number}{number}{number}$", re.MULTILINE)
    rows = row.findall(README.read_text(encoding="utf-8"))
    assert {layout for _, layout, *_ in rows} == set(check_plan.LAYOUTS)
    for name, told, batch, context, least, measured, ratio in rows:
        layout = check_plan.LAYOUTS[told]
        load = Load(int(context), int(batch), torch.float32, torch.float32, check_plan.PAGE_SIZE)
        found = bound(model_shape(name), Way(layout), load, machine, room_of(machine, layout.world, None, 1.0))
        assert float(least) == pytest.approx(1e3 * found.seconds, abs=0.005), (name, told)
        assert float(ratio) == pytest.approx(float(measured) / float(least), abs=0.005)
        assert 1 < float(ratio) < check_plan.FACTOR


@pytest.mark.parametrize(
    ("world", "argv", "words"),
    [
        ("2", [], "check_plan starts the ranks of each layout itself: python -m .*, without torchrun$"),
        (None, ["--model", "bundled", "Llama-9"], "^model='Llama-9' is unknown; use"),
        (
            None,
            ["--machine", "none.json"],
            "none.json: no such file; make it: python -m common.distributed.measure_links",
        ),
    ],
)
def test_what_cannot_be_checked_is_one_line_before_anything_is_measured(world, argv, words, monkeypatch):
    monkeypatch.setattr(check_plan, "measure_here", lambda *_, **__: pytest.fail("it measures"))
    monkeypatch.setattr(sys, "argv", ["check_plan", *argv])
    (monkeypatch.delenv("WORLD_SIZE", raising=False) if world is None else monkeypatch.setenv("WORLD_SIZE", world))
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        check_plan.main()
