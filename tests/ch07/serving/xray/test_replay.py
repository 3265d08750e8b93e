"""A recording on the page, by the command a reader types; and that the page's sources keep their promises."""

import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from ch07_sglang_radix.serving.xray.page import FILES, FOLDER

ROOT = Path(__file__).parents[4]
RECORDING = FOLDER / "recording.jsonl"
# what the replay must do without, as if it were not installed
WITHOUT = "import sys; sys.modules.update(dict.fromkeys(['torch', 'numpy', 'transformers', 'fastapi', 'uvicorn', 'msgspec'])); "


def start(*args):
    code = f"{WITHOUT}import runpy; runpy.run_module('ch07_sglang_radix.serving.xray', run_name='__main__', alter_sys=True)"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def address():
    process = start(RECORDING)
    line = process.stdout.readline()
    yield re.search(r"http://\S+(?=/xray)", line).group()
    process.terminate()
    process.wait(100)
    process.stdout.close()
    process.stderr.close()


def test_the_command_serves_page_and_recording_without_an_engine(address):
    def get(path):
        with urllib.request.urlopen(address + path, timeout=60) as response:
            return response.headers, response.read()

    headers, body = get("/xray")
    assert body == FILES["index.html"].body
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert get("/")[1] == body, "the bare address leads to the page"
    assert get("/xray/recording")[1] == RECORDING.read_bytes()
    assert json.loads(get("/xray/source")[1]) == {"kind": "replay", "name": "recording.jsonl"}
    for name in ("xray.js", "xray.css"):
        assert get(f"/xray/{name}")[1] == FILES[name].body
    for path in ("/xray/page.py", "/xray/../page.py", "//etc/passwd", "/xray/%2e%2e/page.py"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(path)


@pytest.mark.parametrize("args", [["nowhere.jsonl"], [FOLDER / "page.py"], [RECORDING, "--port", "999999"]])
def test_what_cannot_be_shown_is_one_line(args):
    process = start(*args)
    _, said = process.communicate(timeout=200)
    assert process.returncode == 1
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_the_stored_recording_is_small_and_shows_everything():
    assert RECORDING.stat().st_size < 300_000
    lines = [json.loads(line) for line in RECORDING.read_text(encoding="utf-8").splitlines()]
    rows = [row for line in lines[1:] for row in line["change"].get("requests", {}).values() if row]
    assert {row["phase"] for row in rows if "phase" in row} >= {"queued", "prefill", "decode", "retracted", "done"}
    assert lines[0]["state"]["about"]["ranks"] == 2


def test_no_text_becomes_html_and_nothing_comes_from_elsewhere():
    for name, file in FILES.items():
        text = file.body.decode()
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|setAttribute\(\"on", text
        ), name
        assert set(re.findall(r"https?://[^\s'\"]+", text)) <= {"http://www.w3.org/2000/svg"}, name
        assert not re.search(r"<script(?![^>]*\ssrc=)|\son\w+=|\sstyle=", text), (
            f"{name}: the page's own policy forbids it"
        )


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".js")])
def test_a_script_says_first_what_it_is_for(name):
    lines = FILES[name].body.decode().splitlines()
    assert lines[0].startswith("// ")
    assert len(lines) <= 450


def test_the_readme_s_links_lead_somewhere_and_it_names_every_file():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert all((FOLDER / link).exists() for link in links)
    files = {path.name for path in FOLDER.iterdir() if path.suffix in (".py", ".js", ".css", ".html")} - {"__init__.py"}
    assert files <= set(links)
