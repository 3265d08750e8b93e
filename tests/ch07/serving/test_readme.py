"""The commands that the wing's READMEs show run, against a server that `make serve` would start."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ch07.serving.running import ROOT, RunningServer

WING = ROOT / "ch07_sglang_radix" / "serving"
ADDRESS = "http://127.0.0.1:30000"
STARTS = "python -m ch07_sglang_radix.launch_server"


@pytest.fixture(scope="module")
def server():
    running = RunningServer()
    yield running
    assert running.end() == 0


def commands(page: Path) -> str:
    """The first block of a page, without the line that starts the server."""
    block = re.search(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL).group(1)
    first, *others = block.splitlines()
    assert first.startswith(STARTS), first
    return "\n".join(others)


@pytest.mark.parametrize(("page", "shows"), [("README.md", '"text":'), ("openai/README.md", "CompletionUsage(")])
def test_what_the_page_shows_first_runs(server, page, shows, tmp_path):
    script = commands(WING / page)
    assert ADDRESS in script
    if "curl" in script and not shutil.which("curl"):
        pytest.skip("this system has no curl")
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')  # a link would forget its packages
    (tmp_path / "python").chmod(0o755)
    done = subprocess.run(
        ["bash", "-e", "-c", script.replace(ADDRESS, server.url)], cwd=ROOT, capture_output=True, text=True, timeout=120,
        check=False, env=os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert shows in done.stdout


def test_make_serve_starts_the_server_of_the_readme():
    recipe = re.search(r"^serve: setup\n\t(.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE).group(
        1
    )
    assert recipe.replace("$(BIN)/", "") == STARTS
