"""A module under torchrun: it runs on all ranks, and what a failed one has said is in the error."""

import pytest

from common.teaching.torchrun import torchrun

MODULE = """
import os, sys
if sys.argv[1] == "fail":
    print("looked at the model")
    sys.exit(f"rank {os.environ['RANK']} does not like it")
open(f"{sys.argv[1]}.{os.environ['RANK']}", "x").close()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "does_it.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_all_ranks_run_it_or_say_why_not(folder):
    torchrun(2, "does_it", str(folder / "done"))
    assert sorted(path.name for path in folder.glob("done.*")) == ["done.0", "done.1"]
    with pytest.raises(RuntimeError, match="does_it ended with 1:") as error:
        torchrun(1, "does_it", "fail")
    assert "looked at the model" in str(error.value)
    assert "rank 0 does not like it" in str(error.value)
