// The page: takes events from a running engine or a recording, keeps them all, and shows one moment. Time on the page is its own:
// a recording and a live engine can both be stopped, taken step by step and gone back in; the engine does not wait for that.

import { Recording, count, happened, plain, some } from "./events.js";
import { Lanes, question } from "./lanes.js";
import { sparkline, themeChanged } from "./paint.js";
import { Pool, ownerOf, shares } from "./pool.js";
import { asking } from "./prompts.js";
import { Tree, describe } from "./tree.js";

const $ = (id) => document.getElementById(id);
const LIVE = 0;             // the speed "as it comes"
const AGAIN_MS = 1500;      // after a lost connection
const SPARK = 60;           // steps in the small lines

const recording = new Recording();
const tree = new Tree($("tree"), $("tree-scroll"), (id) => pick(id === null ? null : `n${id}`));
const pool = new Pool($("pool"), $("pool-box"), (cell) => pick(cell === null ? null : (view.now?.pages[cell] ?? null), cell));
const lanes = new Lanes($("lanes"), $("lanes-scroll"), (id) => pick(id === null ? null : `r${id}`));
const view = { at: -1, before: null, now: null, playing: true, picked: null, drawn: 0, asked: false };
let source = { kind: "replay" };

// --- which moment is shown

// Shows moment `index`. What is new in it is told against `before`: the moment before it, or, when steps were skipped while
// following a fast engine, the one that was on the screen.
function show(index, before = null) {
  if (!recording.length) return;
  view.at = Math.max(0, Math.min(index, recording.length - 1));
  view.now = recording.at(view.at);
  const follows = recording.events[view.at].type === "step";   // a snapshot says nothing of what was before it
  view.before = follows ? (before ?? recording.at(view.at - 1)) : view.now;
  drawSoon();
}

function advance() {
  const last = recording.length - 1;
  if (view.at >= last) return;
  if (speed() === LIVE) show(last, view.now);
  else show(view.at + 1);
}

const speed = () => Number($("speed").value);

function play(on) {
  view.playing = on;
  const end = source.kind === "replay" && view.at >= recording.length - 1;
  if (on && end) show(0);
  drawSoon();
}

// One clock for all speeds; "as it comes" is as often as the screen is drawn.
let due = 0;
function tick(now) {
  const wait = speed() === LIVE ? 0 : 1000 / speed();
  if (view.playing && now >= due && view.at < recording.length - 1) {
    due = now + wait;
    advance();
    if (source.kind === "replay" && view.at === recording.length - 1) play(false);
  }
  requestAnimationFrame(tick);
}

// --- drawing

function drawSoon() {
  if (view.asked) return;
  view.asked = true;
  requestAnimationFrame(() => {
    view.asked = false;
    draw();
  });
}

function draw() {
  const { now, before, at } = view;
  if (!now) return;
  const picked = pickedOwners();
  tree.draw(before, now);
  tree.highlight(new Set([...picked].filter((owner) => owner[0] === "n").map((owner) => owner.slice(1))));
  pool.draw(before, now, picked);
  const shown = lanes.draw(recording, at, picked);
  drawNumbers(now);
  drawPool(now);
  drawSent(now);
  drawPlayer(now);
  const hidden = now.totals.nodes_left_out;
  const nodes = Object.keys(now.nodes).length;
  $("tree-count").textContent = `${some(nodes, "node")}${hidden ? `, ${count(hidden)} older ones not shown` : ""}`;
  $("lanes-count").textContent = some(shown, "request");
  $("detail").textContent = detail(now);
  drawStory(before, now);
  view.drawn += 1;
  document.body.dataset.at = String(at);   // for whoever drives the page
}

function drawNumbers(now) {
  const { totals } = now;
  $("n-hit").textContent = totals.prompt_tokens ? `${(100 * totals.hit_rate).toFixed(1)} %` : "–";
  $("n-hit").title = `${count(totals.cached_tokens)} of ${count(totals.prompt_tokens)} prompt tokens came from the tree`;
  $("n-rate").textContent = count(Math.round(recording.rate(view.at)));
  $("n-waiting").textContent = count(totals.waiting);
  $("n-running").textContent = count(totals.running);
  $("n-finished").textContent = count(totals.finished);
  $("n-retracted").textContent = count(totals.retractions);
  $("n-evicted").textContent = count(totals.evicted_tokens);
  const from = Math.max(0, view.at - SPARK + 1), steps = Array.from({ length: view.at - from + 1 }, (_, i) => from + i);
  sparkline($("line-hit"), steps.map((i) => recording.totals[i].hit_rate), "protected");
  sparkline($("line-rate"), steps.map((i) => recording.rate(i)), "decode");
}

const KINDS = { protected: "protected", request: "requests", evictable: "evictable", free: "free" };

function drawPool(now) {
  const pages = shares(now), all = now.about.num_pages;
  const cell = now.about.pages_per_cell > 1 ? `, ${now.about.pages_per_cell} a cell` : "";
  $("pool-count").textContent = `${some(all, "page")} of ${some(now.about.page_size, "token")}${cell}`;
  for (const [kind, words] of Object.entries(KINDS)) {
    const item = child($("pool-legend"), kind, "li"), part = child($("pool-bar"), kind, "span");
    item.textContent = `${words} ${count(pages[kind])}`;
    part.style.flexGrow = String(pages[kind]);
  }
}

// The element of that class in `parent`, made at the first time.
function child(parent, name, kind) {
  let element = parent.querySelector(`.${name}`);
  if (!element) {
    element = parent.appendChild(document.createElement(kind));
    element.className = name;
  }
  return element;
}

function drawSent(now) {
  const rows = now.sent.map(([op, label, times, bytes, wire]) => {
    const row = document.createElement("tr");
    row.title = now.about.why[label] ?? "";
    for (const [i, words] of [op.replace("_", "-"), label, `${count(times)}×`, size(bytes), size(wire)].entries()) {
      const cell = row.appendChild(document.createElement("td"));
      cell.textContent = words;
      if (i > 1) cell.className = "num";
    }
    return row;
  });
  $("sent").replaceChildren(...rows);
  const wire = now.sent.reduce((sum, row) => sum + row[4], 0), times = now.sent.reduce((sum, row) => sum + row[2], 0);
  const alone = now.about.ranks === 1 ? "one rank: nothing to send" : "nothing in this step";
  $("sent-count").textContent = times ? `${some(times, "message")}, ${size(wire)}` : alone;
}

const size = (bytes) => (bytes < 10000 ? `${count(bytes)} B` : bytes < 1e7 ? `${count(Math.round(bytes / 1024))} KiB` : `${(bytes / 1048576).toFixed(1)} MiB`);

function drawPlayer(now) {
  const last = recording.length - 1, behind = last - view.at;
  $("scrub").max = String(last);
  $("scrub").value = String(view.at);
  const mixed = now.now.kind === "several" ? "several steps" : now.now.kind;
  $("where").textContent = `step ${count(now.now.step)} · ${mixed} · ${now.now.t.toFixed(2)} s`;
  const running = view.playing && (source.kind === "live" || behind > 0);
  $("play").classList.toggle("on", running);
  $("play").setAttribute("aria-label", running ? "pause" : "play");
  const lost = recording.lost ? `, ${some(recording.lost, "gap")}` : "";
  if (source.kind === "live" && !$("badge").classList.contains("down")) {
    $("badge").textContent = behind > 0 ? `live, ${some(behind, "step")} behind${lost}` : `live${lost}`;
  }
  drawChapters();
}

// Where the workloads of a recording begin: marks on the bar, and buttons that lead there. Live, the buttons start them.
function drawChapters() {
  if (source.kind === "live") return;
  const last = Math.max(1, recording.length - 1);
  if ($("ticks").childElementCount !== recording.marks.length) {
    $("ticks").replaceChildren(...recording.marks.map(([index]) => {
      const tick = document.createElement("i");
      tick.style.left = `${(100 * index) / last}%`;
      return tick;
    }));
    $("chapters").replaceChildren(...recording.marks.map(([index, mark]) => {
      const button = document.createElement("button");
      button.textContent = mark;
      button.addEventListener("click", () => { view.playing = false; show(index); });
      return button;
    }));
  }
  let current = -1;
  recording.marks.forEach(([index], i) => { if (index <= view.at) current = i; });
  [...$("chapters").children].forEach((one, i) => one.setAttribute("aria-pressed", String(i === current)));
}

function drawStory(before, now) {
  const told = before === now ? [["settle", "the beginning"]] : happened(before, now);
  const items = (told.length ? told : [["settle", "tokens of the last step are taken, nothing else"]]).map(([kind, words]) => {
    const item = document.createElement("span");
    item.className = kind;
    item.textContent = words;
    return item;
  });
  $("story").replaceChildren(...items);
}

// --- pointing at things

let cellPicked = null;
function pick(owner, cell = null) {
  if (view.picked === owner && cellPicked === cell) return;
  view.picked = owner;
  cellPicked = cell;
  drawSoon();
}

// What belongs to what is pointed at: a request's own pages and its path, a node's pages and who uses it.
function pickedOwners() {
  const owners = new Set(view.picked ? [view.picked] : []);
  if (!view.picked || !view.now) return owners;
  const id = view.picked.slice(1);
  if (view.picked[0] === "n") (view.now.nodes[id]?.users ?? []).forEach((user) => owners.add(`r${user}`));
  if (view.picked[0] === "r") {
    for (const [node, { users }] of Object.entries(view.now.nodes)) if (users.includes(Number(id))) owners.add(`n${node}`);
  }
  return owners;
}

function detail(now) {
  const owner = view.picked, id = owner?.slice(1);
  const page = cellPicked === null ? "" : `Page ${cellPicked * now.about.pages_per_cell}: `;
  const node = owner?.[0] === "n" ? (now.nodes[id] ?? view.before.nodes[id]) : null;
  if (node) {
    const name = node.name ? `, namespace ${node.name}` : "";
    return `${page}Node ${id}: ${describe(node)}, inserted by ${some(node.hits, "request")}, last used at ${node.used}${name}. “${plain(node.text)}”`;
  }
  const request = owner?.[0] === "r" ? now.requests[id] : null;
  if (request) {
    const why = request.why ? ` (not yet: ${request.why})` : "";
    return `${page}Request #${id}: ${request.phase}${why}, ${request.cached} of ${some(request.prompt, "prompt token")} from the tree, ${request.out} of ${request.most} answer tokens, ${some(request.own, "page")} of its own. “${question(request.says)}” → “${plain(request.text)}”`;
  }
  if (owner?.[0] === "r") return `Request #${id} has ended. “${question(recording.says.get(Number(id)) ?? "")}”`;
  if (owner === "x") return `${page}held by something else than the tree and the requests.`;
  return page ? `${page}${ownerOf(now, cellPicked).kind}.` : "Point at a node, a page or a request.";
}

// --- where events come from

function take(event) {
  const following = view.at === recording.length - 1, forgotten = recording.forgotten;
  if (!recording.add(event)) return;
  if (recording.forgotten > forgotten) view.at = Math.max(0, view.at - (recording.forgotten - forgotten));
  if (view.at < 0) show(0);
  else if (!following || !view.playing) drawSoon();
}

async function replay() {
  badge("replay", source.name);
  const text = await (await fetch("xray/recording")).text();
  for (const line of text.split("\n")) if (line) recording.add(JSON.parse(line));
  $("speed-live").remove();
  view.playing = false;
  about();
  const from = Number(new URLSearchParams(location.hash.slice(1)).get("at") ?? 0);   // /xray#at=120
  show(from);
}

async function live() {
  $("ask-panel").hidden = false;
  $("save").hidden = false;
  $("speed").value = "0";
  asking(source, () => recording.tail?.about.max_total_num_tokens ?? 0);
  for (;;) {
    try {
      await listen();
    } catch (error) {
      badge("down", error.message);
    }
    await new Promise((done) => setTimeout(done, AGAIN_MS));
  }
}

// The stream of /xray/events; not by EventSource, which cannot send a key.
async function listen() {
  const key = $("key").value;
  const response = await fetch("xray/events", { headers: key ? { Authorization: `Bearer ${key}` } : {} });
  if (!response.ok) throw new Error(response.status === 401 ? "a key is needed: type it below" : `the server says ${response.status}`);
  badge("live", "");
  recording.seq = null;   // whatever snapshot comes now is news
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the server has closed the stream");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      const first = !recording.length;
      take(JSON.parse(line.slice(6)));
      if (first) about();
    }
  }
}

function badge(kind, words) {
  $("badge").className = `badge ${kind}`;
  $("badge").textContent = kind === "down" ? `no connection (${words})` : kind;
  $("badge").title = words;
}

function about() {
  const { about } = recording.tail;
  $("about").textContent = [
    about.model, `${some(about.ranks, "rank")} on ${about.device}`, `${count(about.max_total_num_tokens)} tokens in pages of ${about.page_size}`,
    `schedule ${about.schedule_policy}`, `eviction ${about.radix_eviction_policy}`, about.shows && `shown: ${about.shows}`,
  ].filter(Boolean).join(" · ");
}

// --- buttons and keys

const actions = {
  first: () => { view.playing = false; show(0); },
  back: () => { view.playing = false; show(view.at - 1); },
  play: () => play(!(view.playing && (source.kind === "live" || view.at < recording.length - 1))),
  next: () => { view.playing = false; show(view.at + 1); },
  last: () => { view.playing = source.kind === "live"; show(recording.length - 1); },
};
for (const [id, action] of Object.entries(actions)) $(id).addEventListener("click", action);
$("scrub").addEventListener("input", () => { view.playing = false; show(Number($("scrub").value)); });
const KEYS = { Home: "first", ArrowLeft: "back", " ": "play", ArrowRight: "next", End: "last" };
document.addEventListener("keydown", (event) => {
  const inside = (selector) => event.target.closest?.(selector);
  const hasItsOwn = inside("textarea, select, [role=region], input:not([type=range]):not([type=checkbox])") || (event.key === " " && inside("button"));
  if (!KEYS[event.key] || hasItsOwn || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  actions[KEYS[event.key]]();
});

$("save").addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(recording.lines(), { type: "application/jsonl" }));
  link.download = "recording.jsonl";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});

const wantsDark = matchMedia("(prefers-color-scheme: dark)");
function theme(name) {
  document.documentElement.dataset.theme = name;
  themeChanged();
  drawSoon();
}
$("theme").addEventListener("click", () => {
  const dark = (document.documentElement.dataset.theme || (wantsDark.matches ? "dark" : "light")) === "dark";
  theme(dark ? "light" : "dark");
  try {
    localStorage.setItem("theme", dark ? "light" : "dark");
  } catch { /* a browser that keeps nothing */ }
});
wantsDark.addEventListener("change", () => { themeChanged(); drawSoon(); });
try {
  theme(localStorage.getItem("theme") ?? "");
} catch { /* as above */ }
new ResizeObserver(drawSoon).observe($("tree-scroll"));
new ResizeObserver(drawSoon).observe($("lanes-scroll"));
new ResizeObserver(drawSoon).observe($("pool-box"));

async function start() {
  source = await (await fetch("xray/source")).json();
  requestAnimationFrame(tick);
  await (source.kind === "live" ? live() : replay());
}

start().catch((error) => badge("down", error.message));

export { lanes, pool, recording, view };   // for whoever looks at the page from outside
