"""Every command of the chapter's READMEs runs, and prints what the README shows."""

import os
import re
import subprocess
import sys

import pytest

from tests.readme import ROOT, blocks, demos_without_a_command, links, run, short_names

CHAPTER = "ch06_tp_vllm"


def test_the_readme_has_a_command_for_every_demo():
    assert demos_without_a_command(CHAPTER) == []


def test_the_readme_leads_to_exercises_and_projects():
    assert {"exercises/README.md", "projects/README.md"} <= links(CHAPTER)


@pytest.mark.parametrize(("command", "shown"), blocks(CHAPTER), ids=short_names(CHAPTER))
def test_the_command_prints_what_is_shown(command, shown):
    run(command, shown)


def test_the_python_of_the_readme_runs_under_torchrun(tmp_path):
    (code,) = re.findall(r"```python\n(.+?)```", (ROOT / CHAPTER / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "snippet.py").write_text(code, encoding="utf-8")
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        tmp_path / "snippet.py",
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(torchrun, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(("at", "exercise"), [(0, "ex1_row_parallel_bias"), (1, "ex5_prefix_hash")])
def test_a_command_of_the_exercises_runs(at, exercise):
    text = (ROOT / CHAPTER / "exercises" / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^(python .+?)(?: +#.*)?$", text, re.MULTILINE)
    assert len(commands) == 2
    run(commands[at], exercise)
