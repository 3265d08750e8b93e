"""The page in a real browser: what it draws is what the events say, on a projector and on a phone, and its console is silent."""

import itertools
import json
import threading
from functools import partial
from http.server import ThreadingHTTPServer

import pytest

from ch07_sglang_radix.serving.xray.__main__ import Replay
from ch07_sglang_radix.serving.xray.events import merged, snapshot, step
from ch07_sglang_radix.serving.xray.page import FOLDER
from tests.ch07.serving.running import ONE_PROCESS, a_server
from tests.ch07.serving.xray.chromium import binary, chromium

pytestmark = pytest.mark.skipif(
    binary() is None, reason="needs Chromium or Chrome (Debian: apt-get install chromium); CHROMIUM names one"
)
RECORDING = FOLDER / "recording.jsonl"
SIZES = [(1280, 800), (390, 844)]
PAGE = "(await import(`${location.origin}/xray/xray.js`))"


@pytest.fixture(scope="module")
def browser():
    with chromium() as tab:
        yield tab


@pytest.fixture
def tab(browser):
    browser.errors.clear()
    yield browser
    browser.listen(0.05)
    browser.open("about:blank")
    assert browser.errors == []


def replay(tab, recording):
    """Open the page with it, at its beginning."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Replay, recording))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    tab.open(f"http://127.0.0.1:{server.server_address[1]}/xray")
    tab.wait_for("document.body?.dataset.at === '0'")


def states(recording):
    """Every moment of it, by the reducer of Python."""
    lines = [json.loads(line) for line in recording.read_text(encoding="utf-8").splitlines()]
    found = [lines[0]["state"]]
    for line in lines[1:]:
        found.append(merged(found[-1], line["change"]))
    return found


def text(tab, name):
    return tab.run(f"document.getElementById('{name}').textContent")


def show(tab, index):
    tab.run(
        f"(() => {{ const bar = document.getElementById('scrub'); bar.value = {index}; bar.dispatchEvent(new Event('input')); }})()"
    )
    tab.wait_for(f"document.body.dataset.at === '{index}'")


def interesting(moments):
    """Indexes of moments worth looking at: {why: index}."""
    found = {"begin": 0, "end": len(moments) - 1}
    for i, (before, now) in enumerate(itertools.pairwise(moments), 1):
        if now["totals"]["splits"] > before["totals"]["splits"]:
            found["split"] = i
        if now["totals"]["evicted_tokens"] > before["totals"]["evicted_tokens"] and now["nodes"]:
            found.setdefault("evicted", i)
        if now["totals"]["retractions"] > before["totals"]["retractions"]:
            found.setdefault("retracted", i)
        if len(now["nodes"]) >= max(len(state["nodes"]) for state in moments):
            found["largest"] = i
    return found


KIND = """(cell, state) => {
  const owner = state.pages[cell];
  if (owner === undefined) return 'free';
  if (owner[0] === 'r') return 'c' + owner.slice(1) % 8;
  return state.nodes[owner.slice(1)]?.lock ? 'protected' : 'evictable';
}"""


@pytest.mark.parametrize("size", SIZES, ids=["1280", "390"])
def test_a_recording_is_drawn_as_it_was(tab, size):
    moments = states(RECORDING)
    tab.look(*size)
    replay(tab, RECORDING)
    assert text(tab, "badge") == "replay"
    assert interesting(moments).keys() >= {"split", "evicted", "retracted"}
    for why, index in interesting(moments).items():
        show(tab, index)
        now, before = moments[index], moments[max(index - 1, 0)]
        assert tab.run(f"(async () => {PAGE}.view.now)()") == now, why
        drawn = {
            kind: tab.run(f"document.querySelectorAll('#tree .node.{kind}').length")
            for kind in ("protected", "evictable", "gone", "fresh", "cut")
        }
        locked = sum(node["lock"] > 0 for node in now["nodes"].values())
        assert drawn["protected"] == locked
        assert drawn["evictable"] == len(now["nodes"]) - locked
        assert drawn["gone"] == len(before["nodes"].keys() - now["nodes"].keys())
        assert drawn["fresh"] + drawn["cut"] == len(now["nodes"].keys() - before["nodes"].keys())
        assert cells_that_differ(tab) == []
        numbers = {name: text(tab, f"n-{name}") for name in ("waiting", "running", "evicted", "retracted")}
        totals = now["totals"]
        assert numbers == {
            "waiting": str(totals["waiting"]), "running": str(totals["running"]), "evicted": f"{totals['evicted_tokens']:,}",
            "retracted": str(totals["retractions"]),
        }  # fmt: skip
        said = text(tab, "story")
        if why in ("split", "evicted", "retracted"):
            assert why in said, said
        if why == "retracted":
            assert any(f"#{rid}" in said for rid, row in now["requests"].items() if row["phase"] == "retracted")
    assert tab.run("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out at the side"


def cells_that_differ(tab):
    """Cells of the pool whose colour, near the corner of the cell, is not its owner's."""
    return tab.run(f"""(async () => {{
      const {{ pool, view }} = {PAGE}, kind = {KIND};
      const {{ color }} = await import(`${{location.origin}}/xray/paint.js`);
      const {{ columns, size }} = pool.grid, scale = devicePixelRatio, wrong = [], copy = document.createElement('canvas');
      Object.assign(copy, {{ width: pool.canvas.width, height: pool.canvas.height }});
      const context = copy.getContext('2d', {{ willReadFrequently: true }});
      context.drawImage(pool.canvas, 0, 0);
      for (let cell = 0; cell < view.now.about.cells; cell++) {{
        const x = (cell % columns) * size + 2.9, y = Math.floor(cell / columns) * size + 2.9;
        const [r, g, b, a] = context.getImageData(x * scale, y * scale, 1, 1).data, name = kind(cell, view.now);
        const is = a ? `rgb(${{r}}, ${{g}}, ${{b}})` : 'free', should = name === 'free' ? 'free' : color(name);
        if (is !== should) wrong.push([cell, name, is, should]);
      }}
      return wrong;
    }})()""")


def test_time_can_be_stopped_stepped_and_played(tab):
    tab.look(1280, 800)
    replay(tab, RECORDING)
    press = "document.getElementById('{}').click()"
    for button, index in [("next", 1), ("next", 2), ("back", 1), ("first", 0)]:
        tab.run(press.format(button))
        tab.wait_for(f"document.body.dataset.at === '{index}'")
    tab.run("document.getElementById('speed').value = '30'")
    tab.run(press.format("play"))
    tab.wait_for("Number(document.body.dataset.at) > 5")
    tab.run(press.format("play"))
    stopped = tab.run("document.body.dataset.at")
    tab.listen(0.3)
    assert tab.run("document.body.dataset.at") in (stopped, str(int(stopped) + 1)), "it has stopped"
    tab.run(press.format("last"))
    last = len(states(RECORDING)) - 1
    tab.wait_for(f"document.body.dataset.at === '{last}'")
    chapters = tab.run("[...document.querySelectorAll('#chapters button')].map((one) => one.textContent)")
    assert chapters == ["shared prefix", "multi-turn", "tree of thought", "small pool"]
    tab.run("document.querySelectorAll('#chapters button')[2].click()")
    tab.wait_for("document.querySelectorAll('#chapters button')[2].getAttribute('aria-pressed') === 'true'")


def test_whoever_points_at_a_node_is_told_about_it(tab):
    moments = states(RECORDING)
    index = interesting(moments)["largest"]
    tab.look(1280, 800)
    replay(tab, RECORDING)
    show(tab, index)
    number, node = max(moments[index]["nodes"].items(), key=lambda one: one[1]["length"])
    tab.point(f'#tree [data-id="{number}"]')
    tab.wait_for(f"document.getElementById('detail').textContent.startsWith('Node {number}: {node['length']} tokens')")


def test_both_themes_by_the_system_s_wish_and_by_the_button(tab):
    tab.look(1280, 800, "dark")
    replay(tab, RECORDING)
    back = "getComputedStyle(document.body).backgroundColor"
    dark = tab.run(back)
    assert cells_that_differ(tab) == []
    tab.run("document.getElementById('theme').click()")
    tab.wait_for(f"{back} !== '{dark}'")
    light = tab.run(back)
    tab.look(1280, 800, "light")
    assert tab.run(back) == light, "the button's choice stays"
    tab.run("document.getElementById('theme').click()")
    tab.wait_for(f"{back} === '{dark}'")
    tab.run("localStorage.clear()")


EVIL = "<img src=x onerror=alert(1)><script>document.title='broken'</script>"


def test_a_prompt_is_text_whatever_is_in_it(tab, tmp_path):
    moments = states(RECORDING)
    state = json.loads(json.dumps(moments[interesting(moments)["largest"]]))
    for node in state["nodes"].values():
        node |= {"text": EVIL, "name": EVIL}
    for request in state["requests"].values():
        request |= {"says": EVIL, "text": EVIL, "why": EVIL}
    state["about"]["model"] = state["now"]["mark"] = EVIL
    path = tmp_path / "evil.jsonl"
    path.write_bytes(snapshot(0, state) + b"\n" + step(1, {"now": {"step": 1 << 40}}) + b"\n")
    tab.look(1280, 800)
    replay(tab, path)
    number = next(iter(state["nodes"]))
    tab.point(f'#tree [data-id="{number}"]')
    tab.wait_for("document.getElementById('detail').textContent.includes('<script>')")
    assert text(tab, "about").startswith(EVIL)
    assert tab.run("document.title") == "X-ray of an engine"
    assert tab.run("document.querySelectorAll('main img, main script, header img').length") == 0


@pytest.fixture(scope="module")
def server():
    flags = ("--page-size", "4", "--max-total-tokens", "704", "--tp-size", "2", "--api-key", "secret")
    with a_server(*flags, *ONE_PROCESS) as running:
        yield running


def give_key(tab):
    tab.wait_for("document.getElementById('badge')?.classList.contains('down')")
    assert "a key is needed" in text(tab, "badge")
    tab.run("document.getElementById('key').value = 'secret'")
    tab.wait_for("document.getElementById('badge').textContent === 'live'")
    tab.errors.clear()  # the browser itself reports each 401


def info_of(server):
    return server.call("/server_info", headers={"Authorization": "Bearer secret"})[1]


def click(tab, selector):
    tab.run(f"document.querySelector({json.dumps(selector)}).click()")


@pytest.mark.parametrize("size", SIZES, ids=["1280", "390"])
def test_what_is_asked_on_the_page_is_seen_on_the_page(tab, server, size):
    server.call("/flush_cache", headers={"Authorization": "Bearer secret"}, method="POST")
    tab.look(*size)
    tab.open(f"{server.url}/xray")
    give_key(tab)
    before = info_of(server)
    tab.run("document.getElementById('prompt').value = 'What is a radix cache?'")
    for number in (1, 2):
        tab.run("document.getElementById('ask').requestSubmit()")
        tab.wait_for(f"document.querySelectorAll('#answers li').length === {number}")
        tab.wait_for("document.querySelector('#answers li').textContent !== '…'")
    answers = tab.run("[...document.querySelectorAll('#answers li')].map((one) => one.textContent)")
    assert answers[1].startswith("0 of ")
    assert answers[0].split()[0] != "0", "the second time it comes from the tree"
    assert "prefix" in answers[0]
    click(tab, "#chapters button")
    tab.wait_for(
        "document.querySelectorAll('#answers li').length === 10 && !document.querySelector('#chapters button').disabled"
    )
    tab.wait_for("document.getElementById('n-running').textContent === '0'")
    seen = tab.run(f"(async () => {PAGE}.view.now)()")
    info = info_of(server)
    told = (
        "free_tokens",
        "evictable_tokens",
        "protected_tokens",
        "waiting",
        "running",
        "prompt_tokens",
        "cached_tokens",
        "retractions",
    )
    assert {name: seen["totals"][name] for name in told} == {name: info[name] for name in told}
    assert info["prompt_tokens"] > before["prompt_tokens"]
    assert tab.run("document.querySelectorAll('#tree .node').length") >= len(seen["nodes"]) > 8
    assert cells_that_differ(tab) == []
    assert tab.run(f"(async () => {PAGE}.recording.says.size)()") == 10, "each has had a lane"
    sent = tab.run(f"(async () => {PAGE}.recording.events.map((event) => event.change?.sent ?? []))()")
    assert {row[1] for rows in sent for row in rows} >= {
        "task",
        "embed_tokens",
        "o_proj",
        "down_proj",
        "logits",
        "tokens",
    }
    assert tab.run("document.documentElement.scrollWidth <= innerWidth")


def test_the_engine_is_held_and_taken_step_by_step(tab, server):
    tab.look(1280, 800)
    tab.open(f"{server.url}/xray")
    give_key(tab)
    hold, step, run = (f"#engine button:nth-of-type({n})" for n in (1, 2, 3))
    click(tab, hold)
    tab.run("document.getElementById('ask').requestSubmit()")
    tab.wait_for("document.getElementById('n-waiting').textContent === '1'")
    click(tab, step)
    tab.wait_for("document.getElementById('story').textContent.includes('prefill')")
    click(tab, step)
    tab.wait_for("document.getElementById('story').textContent.includes('decode')")
    tab.listen(0.3)
    assert text(tab, "n-running") == "1", "it is still held"
    click(tab, run)
    tab.wait_for("document.querySelector('#answers li').textContent !== '…'")
    tab.wait_for("document.getElementById('n-running').textContent === '0'")
    server.call("/flush_cache", headers={"Authorization": "Bearer secret"}, method="POST")
    tab.wait_for("document.getElementById('story').textContent.includes('evicted')")
    assert tab.run("document.querySelectorAll('#tree .node:not(.gone)').length") == 0
