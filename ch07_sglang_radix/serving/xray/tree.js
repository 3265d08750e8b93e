// The radix tree as a drawing that reads from left to right: the first child stands on its parent's line, so that a line of
// boxes is a text as it was computed. A drawing shows one moment and what the step before it has changed: nodes that have just
// gone stay, in red, for this one step.

import { count, fit, plain, splits } from "./events.js";

const SVG = "http://www.w3.org/2000/svg";
const CHARACTER = 7.25;            // width of a character of the boxes' font, 12 px
const ROOMY = { row: 50, box: 40, text: 16, meta: 31 };
const NORMAL = { row: 29, box: 24, text: 16, meta: 0 };
const TIGHT = { row: 13, box: 10, text: 0, meta: 0 };
const GAP = 30, PAD = 12, ROOT = 7;
const LEAST_CHARACTERS = 9, MOST_CHARACTERS = 44;
const CAP_OF_META = 24;            // characters that the second line of a box needs

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
    const leaves = nodes.reduce((sum, node) => sum + (node.children.length === 0), 0);
    const height = this.box.clientHeight - 4, width = this.box.clientWidth - 4;
    const size = leaves * ROOMY.row + PAD <= height || leaves <= 6 ? ROOMY : leaves * NORMAL.row <= 2.5 * height ? NORMAL : TIGHT;
    const most = widest(nodes, width, size);
    place(nodes, size, most);
    const right = Math.max(width, ...nodes.map((node) => node.x + node.width + PAD));
    const bottom = Math.max(height, leaves * size.row + PAD);
    set(this.svg, { width: right, height: bottom, viewBox: `0 0 ${right} ${bottom}` });
    set(this.root, { cx: PAD + ROOT, cy: PAD / 2 + size.row / 2 });
    const seen = new Set();
    for (const node of nodes) {
      seen.add(node.id);
      this.drawNode(node, size, most, now);
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

  drawNode(node, size, most, now) {
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
    const news = node.cut ? " cut" : node.fresh ? " fresh" : "";
    set(group, { class: `node ${state}${news}`, "data-id": node.id, "aria-label": `node ${node.id}: ${describe(node)}` });
    group.style.transform = `translate(${node.x}px, ${node.y}px)`;
    const [rect, label, meta] = group.children;
    set(rect, { width: node.width, height: size.box });
    label.textContent = size.text ? fit(plain(node.text), characters(node, size, most)) : "";
    set(label, { x: 8, y: size.text });
    drawMeta(meta, node, size, now);
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

// How many characters a box may show at most, so that the widest line of boxes fits into `width`.
function widest(nodes, width, size) {
  if (!size.text) return LEAST_CHARACTERS;
  for (let most = MOST_CHARACTERS; most > LEAST_CHARACTERS; most -= 1) {
    const reach = new Map();
    let furthest = 0;
    for (const node of nodes) {
      const left = node.above ? reach.get(node.above) + GAP : PAD + 2 * ROOT + GAP;
      reach.set(node, left + boxWidth(node, size, most));
      furthest = Math.max(furthest, reach.get(node));
    }
    if (furthest + PAD <= width) return most;
  }
  return LEAST_CHARACTERS;
}

const long = (text) => [...text].reduce((sum, character) => sum + (character.codePointAt(0) > 0x2e7f ? 2 : 1), 0);
const metaRoom = (node, size) => (size.meta ? 0 : String(node.length).length + 2);
const characters = (node, size, most) => Math.min(most, Math.max(long(plain(node.text)), 2));

function boxWidth(node, size, most) {
  if (!size.text) return 14 + Math.min(60, node.length);
  const meta = size.meta ? Math.min(CAP_OF_META, 9 + 4 * Math.min(node.users.length, 4) + (node.lock ? 4 : 0)) : 0;
  return 16 + CHARACTER * Math.max(characters(node, size, most) + metaRoom(node, size), Math.min(meta, most));
}

function place(nodes, size, most) {
  let row = 0;
  for (const node of nodes) {
    const first = node.above && node.above.children[0] === node;
    if (!first && node !== nodes[0]) row += 1;
    node.row = row;
    node.x = node.above ? node.above.x + node.above.width + GAP : PAD + 2 * ROOT + GAP;
    node.y = PAD / 2 + row * size.row + (size.row - size.box) / 2;
    node.width = boxWidth(node, size, most);
    // where it comes from: out of its parent's end; the lower half of a split, out of the upper one
    node.origin = node.above ? { x: node.above.x + node.above.width - 20, y: node.above.y } : { x: PAD, y: node.y };
    if (node.cut) node.origin = { x: node.x, y: node.y };
  }
}

function curve(node, size) {
  const y = node.y + size.box / 2, from = node.above ? node.above.x + node.above.width : PAD + 2 * ROOT;
  const start = node.above ? node.above.y + size.box / 2 : PAD / 2 + size.row / 2;
  const middle = from + GAP * 0.55;
  return `M ${from} ${start} C ${middle} ${start}, ${from + GAP * 0.3} ${y}, ${node.x} ${y}`;
}

// Length, lock and users: a second line where there is room, else the length alone at the right end.
function drawMeta(meta, node, size) {
  meta.replaceChildren();
  if (!size.text) return;
  if (!size.meta) {
    meta.append(text(node.width - 7, size.text, String(node.length), { "text-anchor": "end" }));
    return;
  }
  let x = 8;
  const length = `${count(node.length)} tok`;
  meta.append(text(x, size.meta, length));
  x += 6.2 * length.length + 8;
  if (node.lock && x + 26 < node.width) {
    meta.append(make("path", { class: "lock", d: `M${x} ${size.meta - 5}h8v6h-8z M${x + 1.7} ${size.meta - 5}v-2.2a2.3 2.3 0 0 1 4.6 0v2.2` }));
    meta.append(text(x + 11, size.meta, String(node.lock)));
    x += 22 + 6 * (String(node.lock).length - 1);
  }
  for (const [index, user] of node.users.entries()) {
    const word = String(user), wide = 8 + 6.4 * word.length, left = node.users.length - index;
    if (x + wide + (left > 1 ? 24 : 0) > node.width - 4) {
      meta.append(text(x, size.meta, `+${left}`));
      break;
    }
    const pill = make("g", { class: `request c${user % 8}` });
    pill.append(make("rect", { x, y: size.meta - 9.5, width: wide, height: 12, rx: 6 }), text(x + wide / 2, size.meta, word, { "text-anchor": "middle" }));
    meta.append(pill);
    x += wide + 3;
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
