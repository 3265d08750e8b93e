"""The wing's README: its commands run and print what it shows, its examples answer, its tables are the code's."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from ch07_sglang_radix.serving.http_args import OURS, HttpArgs
from tests import anatomy
from tests.ch07.serving.running import ONE_PROCESS, a_server
from tests.readme import ROOT, blocks, demos_without_a_command, run, short_names

WING = "ch07_sglang_radix/serving"
TEXT = (ROOT / WING / "README.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:30000"


def part(name):
    return re.search(rf"<!-- {name} -->(.*?)<!-- /{name} -->", TEXT, re.DOTALL).group(1)


def test_the_readme_has_a_command_for_every_demo():
    assert demos_without_a_command(WING) == []


@pytest.mark.parametrize(("command", "shown"), blocks(WING), ids=short_names(WING))
def test_the_command_prints_what_is_shown(command, shown):
    run(command, shown)


def test_every_step_opens_with_questions_and_ends_with_their_answers():
    steps = re.split(r"^## \d+\. ", TEXT, flags=re.MULTILINE)[1:]
    assert len(steps) == 9
    for step in steps[:-1]:
        questions = re.search(r"^> (.*?)\n\n", step, re.DOTALL | re.MULTILINE).group(1)
        assert 2 <= questions.count("?") <= 4, step[:40]
        assert "<details><summary>Answers</summary>" in step, step[:40]


def test_links_lead_somewhere_and_to_headings_that_are_there():
    anatomy.check_links(ROOT / WING / "README.md")


def test_the_table_of_flags_is_the_code_s():
    rows = {
        flag.strip("-").replace("-", "_"): (default, said)
        for flags, default, said in re.findall(r"^\| (`--.+?`) \| (.+?) \| (.+?) \|$", part("flags"), re.MULTILINE)
        for flag in re.findall(r"`(--[\w-]+)`", flags)
    }
    known = {one.name: one.default for one in fields(HttpArgs) if one.name != "engine"}
    assert set(rows) == set(known)
    assert {name for name, (_, said) in rows.items() if said.startswith("ours")} == set(OURS)
    for name, (default, _) in rows.items():
        if (
            isinstance(known[name], str | int | float)
            and not isinstance(known[name], bool)
            and name != "max_body_bytes"
        ):
            assert default == f"{known[name]:g}" if isinstance(known[name], float) else str(known[name]), name


# --- what it says one can ask


@pytest.fixture(scope="module")
def server():
    with a_server(*ONE_PROCESS) as server:
        yield server


def environment():
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("line", re.findall(r"^curl .+$", part("examples"), re.MULTILINE))
def test_curl_is_answered(server, line):
    command = [*shlex.split(line.replace(ADDRESS, server.url)), "--silent", "--show-error", "--fail-with-body"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "/health" in line or "{" in done.stdout


def test_the_official_client_prints_what_is_shown(server):
    program, shown = re.search(
        r"```python\n(.+?)```\n\nprints\n\n```text\n(.+?)```", part("examples"), re.DOTALL
    ).groups()
    done = subprocess.run(
        [sys.executable, "-c", program.replace(ADDRESS, server.url)], env=environment(), cwd=ROOT, capture_output=True,
        text=True, encoding="utf-8", timeout=250, check=False,
    )  # fmt: skip
    assert (done.stdout, done.returncode) == (shown, 0), done.stderr


def test_a_conversation_in_the_terminal(server):
    (line,) = re.findall(r"^python -m \S+\.chat .+$", part("examples"), re.MULTILINE)
    command = [sys.executable, *shlex.split(line.replace(ADDRESS, server.url))[1:]]
    done = subprocess.run(
        command, input="What is a radix cache?\n/quit\n", env=environment(), cwd=ROOT, capture_output=True, text=True,
        encoding="utf-8", timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "A prefix cache kept as a radix tree" in done.stdout


def test_the_way_in_is_shown_from_above():
    for readme in ("README.md", "ch07_sglang_radix/README.md"):
        assert "serving/README.md)" in (ROOT / readme).read_text(encoding="utf-8"), readme
    assert Path(ROOT / "notebooks" / "ch07_4_serving.ipynb").exists()


def test_make_serve_starts_the_server_of_the_readme():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = re.search(r"^serve: setup\n\t(.*)$", makefile, re.MULTILINE).group(1)
    assert recipe.replace("$(BIN)/", "") == "python -m ch07_sglang_radix.launch_server"
