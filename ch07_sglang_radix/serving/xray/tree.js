// The radix tree as a drawing that reads from left to right: a line of boxes is a text as it was computed. A tree that is not too
// deep is spread out, the first child on its parent's line; a deep one, or a narrow screen, gets an outline: a line runs on
// until it branches, and its continuations stand below, indented. A drawing shows one moment and what the step before it
// has changed: nodes that have just gone stay, in red, for this one step.

import { count, fit, plain, splits } from "./events.js";

const SVG = "http://www.w3.org/2000/svg";
// How dense it is drawn: height of a row and a box, where the lines of text stand in it, width of a character. Without `meta`
// length, lock and users stand behind the text and not below it.
const ROOMY = { row: 50, box: 40, text: 16, meta: 31, character: 7.25 };
const NORMAL = { row: 29, box: 24, text: 16, character: 7.25 };
const DENSE = { row: 21, box: 18, text: 13, character: 6.65, small: true };
const TIGHT = { row: 12, box: 9 };
const GAP = 30, PAD = 12, ROOT = 7;
const LEFT = PAD + 2 * ROOT + GAP; // where the boxes begin
const LEAST_CHARACTERS = 8, EASY_CHARACTERS = 20, MOST_CHARACTERS = 46;
const SPREAD_CHARACTERS = 12;      // a spread tree with less than that in a box becomes an outline
const NARROW = 560;                // a phone: one box a line, and scroll
const JOINT = 12, INDENT = 26;     // in an outline: between the boxes of a line, and how far its continuations are moved in
const PILLS = 3;                   // users named in a box

export class Tree {
  // pick(id or null): somebody points at a node
  constructor(svg, box, pick) {
    this.svg = svg;
    this.box = box;
    this.pick = pick;
    this.groups = new Map();
    this.edges = new Map();
    this.edgeLayer = svg.appendChild(make("g"));
    this.nodeLayer = svg.appendChild(make("g"));
    this.root = this.nodeLayer.appendChild(make("circle", { r: ROOT, class: "root" }));
  }

  draw(before, now) {
    const nodes = arranged(before, now);
    const height = this.box.clientHeight - 4, width = this.box.clientWidth - 4;
    const { size, rows } = laidOut(nodes, width, height);
    const right = Math.max(width, ...nodes.map((node) => node.x + node.width + PAD));
    const bottom = Math.max(height, rows * size.row + PAD);
    set(this.svg, { width: right, height: bottom, viewBox: `0 0 ${right} ${bottom}` });
    set(this.root, { cx: PAD + ROOT, cy: PAD / 2 + size.row / 2 });
    const seen = new Set();
    for (const node of nodes) {
      seen.add(node.id);
      this.drawNode(node, size);
    }
    for (const [id, group] of this.groups) {
      if (!seen.has(id)) {
        group.remove();
        this.edges.get(id).remove();
        this.groups.delete(id);
        this.edges.delete(id);
      }
    }
  }

  drawNode(node, size) {
    let group = this.groups.get(node.id);
    if (!group) {
      group = this.nodeLayer.appendChild(make("g", { tabindex: "0", role: "button" }));
      group.append(make("rect", { rx: 5 }), make("text", { class: "label" }), make("g", { class: "meta" }));
      for (const event of ["pointerenter", "focus", "click"]) group.addEventListener(event, () => this.pick(node.id));
      group.addEventListener("pointerleave", () => this.pick(null));
      this.groups.set(node.id, group);
      const start = node.origin ?? node;
      group.style.transform = `translate(${start.x}px, ${start.y}px)`;
      this.edges.set(node.id, this.edgeLayer.appendChild(make("path")));
      group.getBoundingClientRect();   // so that the way from there is a transition
    }
    const state = node.gone ? "gone" : node.lock ? "protected" : "evictable";
    const news = `${node.cut ? " cut" : node.fresh ? " fresh" : ""}${size.small ? " small" : ""}`;
    set(group, { class: `node ${state}${news}`, "data-id": node.id, "aria-label": `node ${node.id}: ${describe(node)}` });
    group.style.transform = `translate(${node.x}px, ${node.y}px)`;
    const [rect, label, meta] = group.children;
    set(rect, { width: node.width, height: size.box });
    label.textContent = size.text ? fit(words(node), node.most) : "";
    set(label, { x: 8, y: size.text ?? 0 });
    meta.replaceChildren();
    if (size.text) drawMeta(meta, node, size.meta ? 8 : 16 + textWidth(node, size, node.most), size.meta ?? size.text);
    const edge = this.edges.get(node.id);
    set(edge, { class: `edge ${state}${news}`, d: curve(node, size) });
    edge.style.setProperty("d", `path("${curve(node, size)}")`);   // where CSS knows it, it moves with the nodes
  }

  highlight(ids) {
    for (const [id, group] of this.groups) group.classList.toggle("picked", ids.has(id));
  }
}

export function describe(node) {
  const users = node.users.length ? `, shared by ${node.users.map((id) => `#${id}`).join(" ")}` : "";
  return `${node.length} tokens${node.lock ? `, lock_ref ${node.lock}` : ", evictable"}${users}`;
}

// Nodes of this moment and those that have just gone, parents first, each with its children in the order of their age.
function arranged(before, now) {
  const byId = new Map();
  const add = (id, node, more) => byId.set(id, { id, ...node, children: [], ...more });
  const cut = new Map(splits(before, now));
  for (const [id, node] of Object.entries(now.nodes)) add(id, node, { fresh: !(id in before.nodes), cut: cut.has(id), lower: cut.get(id) });
  for (const [id, node] of Object.entries(before.nodes)) if (!byId.has(id)) add(id, node, { gone: true, lock: 0, users: [] });
  const top = [];
  for (const node of byId.values()) {
    node.above = byId.get(String(node.parent)) ?? null;
    (node.above ? node.above.children : top).push(node);
  }
  // a node that a split has made stands where the one it was cut from stood, though it is younger
  const age = (node) => (node.age ??= Math.min(Number(node.id), ...node.children.map(age)));
  const nodes = [];
  const visit = (node, depth) => {
    node.depth = depth;
    nodes.push(node);
    node.children.sort((a, b) => age(a) - age(b)).forEach((child) => visit(child, depth + 1));
  };
  top.sort((a, b) => age(a) - age(b)).forEach((node) => visit(node, 0));
  return nodes;
}

// Gives each node its place and the characters that it may show: as roomy as the height allows. {size, rows}
function laidOut(nodes, width, height) {
  const fits = ({ size, rows }) => rows * size.row + PAD <= height;
  const ways = [[ROOMY, EASY_CHARACTERS], [NORMAL, EASY_CHARACTERS], [DENSE, EASY_CHARACTERS]];
  if (width > NARROW) ways.push([DENSE, LEAST_CHARACTERS]);
  let layout;
  for (const [size, least] of ways) {
    layout = place(nodes, width, size, least);
    if (fits(layout)) return layout;
  }
  return layout.rows * DENSE.row <= 4 * height ? layout : place(nodes, width, TIGHT, LEAST_CHARACTERS);
}

// least: characters of a box in an outline, before its line goes on below.
function place(nodes, width, size, least) {
  const most = size.text ? widest(nodes, width, size) : LEAST_CHARACTERS;
  const rows = most ? spread(nodes, size, most) : outline(nodes, width, size, least);
  for (const node of nodes) {
    node.y = PAD / 2 + node.row * size.row + (size.row - size.box) / 2;
    // where it comes from: out of its parent's end; the lower half of a split, out of the upper one
    node.origin = node.above && !node.cut ? { x: node.above.x + node.above.width - 20, y: node.above.y } : { x: node.x, y: node.y };
  }
  return { size, rows };
}

// How many characters a box may show at most, so that the widest line of a spread tree fits; 0 if that is too few.
function widest(nodes, width, size) {
  for (let most = MOST_CHARACTERS; most >= SPREAD_CHARACTERS; most -= 1) {
    const reach = new Map();
    let furthest = 0;
    for (const node of nodes) {
      reach.set(node, (node.above ? reach.get(node.above) + GAP : LEFT) + boxWidth(node, size, most));
      furthest = Math.max(furthest, reach.get(node));
    }
    if (furthest + PAD <= width) return most;
  }
  return 0;
}

function spread(nodes, size, most) {
  let row = 0;
  for (const node of nodes) {
    if (node !== nodes[0] && node.above?.children[0] !== node) row += 1;
    node.row = row;
    node.most = most;
    node.x = node.above ? node.above.x + node.above.width + GAP : LEFT;
    node.width = boxWidth(node, size, most);
  }
  return row + 1;
}

function outline(nodes, width, size, least) {
  let row = -1;
  for (const first of nodes) {
    if (first.above?.children.length === 1) continue;   // stands on a line already
    const line = [first];
    while (line[line.length - 1].children.length === 1) line.push(line[line.length - 1].children[0]);
    const start = first.above ? first.above.start + INDENT : LEFT;
    let most = MOST_CHARACTERS;
    const length = () => line.reduce((sum, node) => sum + boxWidth(node, size, most) + JOINT, 0);
    while (most > least && start + length() + PAD > width) most -= 1;
    row += 1;
    let x = start;
    for (const node of line) {
      node.width = boxWidth(node, size, most);
      if (x > start && x + node.width + PAD > width) {   // too long for one line: it goes on below
        row += 1;
        x = start + INDENT / 2;
      }
      Object.assign(node, { row, x, start, most, inLine: node !== first });
      x += node.width + JOINT;
    }
  }
  return row + 1;
}

const words = (node) => plain(node.text).trim();
const long = (text) => [...text].reduce((sum, character) => sum + (character.codePointAt(0) > 0x2e7f ? 2 : 1), 0);
const textWidth = (node, size, most) => size.character * Math.min(most, Math.max(long(words(node)), 2));

function boxWidth(node, size, most) {
  if (!size.text) return 14 + Math.min(60, node.length);
  const text = textWidth(node, size, most), meta = metaOf(node).reduce((sum, one) => sum + one.width, 0);
  return size.meta ? 16 + Math.max(text, meta) : 18 + text + meta;
}

// Length, lock and users of a node, each with the width that it takes.
function metaOf(node) {
  const length = count(node.length), told = [{ kind: "length", words: length, width: 6.4 * length.length + 7 }];
  if (node.lock > 1) told.push({ kind: "lock", words: String(node.lock), width: 16 + 6.4 * String(node.lock).length });
  const shown = node.users.length > PILLS ? PILLS - 1 : PILLS;
  for (const user of node.users.slice(0, shown)) told.push({ kind: "pill", user, words: String(user), width: 11 + 6.2 * String(user).length });
  const more = node.users.length - shown;
  if (more > 0) told.push({ kind: "more", words: `+${more}`, width: 7 + 6.4 * String(more).length });
  return told;
}

// From its parent's end; in an outline, to the next line, down from where the parent's line begins.
function curve(node, size) {
  const y = node.y + size.box / 2, above = node.above;
  if (above && above.start !== undefined && above.row !== node.row) {
    const x = (node.inLine ? node.start : above.start) + 9, top = above.y + size.box;
    return `M ${x} ${top} C ${x} ${y}, ${x} ${y}, ${node.x} ${y}`;
  }
  const from = above ? above.x + above.width : PAD + 2 * ROOT;
  const start = above ? above.y + size.box / 2 : PAD / 2 + size.row / 2;
  return `M ${from} ${start} C ${from + GAP * 0.55} ${start}, ${from + GAP * 0.3} ${y}, ${node.x} ${y}`;
}

function drawMeta(meta, node, left, y) {
  let x = left;
  for (const { kind, words, width, user } of metaOf(node)) {
    if (kind === "lock") {
      meta.append(make("path", { class: "lock", d: `M${x} ${y - 5.5}h8v6h-8z M${x + 1.7} ${y - 5.5}v-2.2a2.3 2.3 0 0 1 4.6 0v2.2` }), text(x + 10, y, words));
    } else if (kind === "pill") {
      const pill = make("g", { class: `request c${user % 8}` }), wide = width - 3;
      pill.append(make("rect", { x, y: y - 9.5, width: wide, height: 12, rx: 6 }), text(x + wide / 2, y, words, { "text-anchor": "middle" }));
      meta.append(pill);
    } else meta.append(text(x, y, words));
    x += width;
  }
}

function text(x, y, words, more = {}) {
  const element = make("text", { x, y, ...more });
  element.textContent = words;
  return element;
}

function make(name, attributes = {}) {
  return set(document.createElementNS(SVG, name), attributes);
}

function set(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}
