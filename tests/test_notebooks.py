"""Each notebook is its .py file, run, with what came out stored in it. (`make test` runs them again, with nbmake.)"""

import json
from pathlib import Path

import jupytext
import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
SOURCES = sorted(NOTEBOOKS.glob("*.py"))


def test_every_notebook_is_paired():
    assert [path.stem for path in SOURCES] == sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
    assert SOURCES


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_cells_are_those_of_the_source_and_outputs_are_stored(source):
    stored = json.loads(source.with_suffix(".ipynb").read_text(encoding="utf-8"))["cells"]
    written = jupytext.read(source).cells
    assert ["".join(cell["source"]) for cell in stored] == [cell.source for cell in written]
    outputs = [output for cell in stored for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert str(NOTEBOOKS.parent) not in json.dumps(stored), "a path of the machine that ran it"
