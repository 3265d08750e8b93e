// The events of events.py, on the page's side: rebuild any moment of a recording, and say in words what a step has done.

export const VERSION = 1;
const EVERY = 32;      // a whole state is kept for one step in so many; those between are made from it
const MOST = 20000;    // steps kept; then the older half is forgotten

// JSON merge patch (RFC 7396): what is named replaces, null removes, the rest stays. Nothing is changed in place.
export function merged(state, change) {
  const result = { ...state };
  for (const [key, value] of Object.entries(change)) {
    if (value === null) delete result[key];
    else if (typeof value === "object" && !Array.isArray(value)) {
      const before = result[key];
      result[key] = merged(typeof before === "object" && !Array.isArray(before) ? before : {}, value);
    } else result[key] = value;
  }
  return result;
}

// Everything that was told, in order. Index i is a moment: 0 the first snapshot, i the state behind the i-th step.
export class Recording {
  constructor() {
    this.forgotten = 0;
    this.clear();
  }

  clear() {
    this.events = [];
    this.states = new Map();   // index -> state, for one in EVERY
    this.lanes = [];           // index -> Map(request -> [phase, new tokens])
    this.says = new Map();     // request -> the end of its prompt
    this.totals = [];          // index -> {t, ...totals}
    this.marks = [];           // [index, chapter]
    this.tail = null;
    this.seq = null;
    this.lost = 0;
  }

  get length() {
    return this.events.length;
  }

  // Takes an event; false if it says nothing new. Throws for what this page cannot read.
  add(event) {
    if (event.type === "snapshot") {
      if (event.version !== VERSION) throw new Error(`events of version ${event.version}; this page reads ${VERSION}`);
      if (this.length && event.seq === this.seq) return false;   // for another page that came late
      this.tail = event.state;
    } else if (event.type === "step") {
      if (!this.length) throw new Error("a recording begins with a snapshot");
      if (event.seq !== this.seq + 1) this.lost += 1;
      this.tail = merged(this.tail, event.change);
    } else throw new Error("an event is a snapshot or a step");
    this.seq = event.seq;
    this.keep(event);
    if (this.length > MOST) this.forget(MOST / 2);
    return true;
  }

  keep(event) {
    const index = this.events.push(event) - 1;
    if (index % EVERY === 0 || event.type === "snapshot") this.states.set(index, this.tail);
    const lane = new Map();
    for (const [id, request] of Object.entries(this.tail.requests)) {
      lane.set(Number(id), [request.phase, request.new]);
      this.says.set(Number(id), request.says);
    }
    this.lanes.push(lane);
    this.totals.push({ ...this.tail.totals, t: this.tail.now.t, step: this.tail.now.step, kind: this.tail.now.kind });
    const mark = this.tail.now.mark;
    if (mark && (!this.marks.length || this.marks[this.marks.length - 1][1] !== mark)) this.marks.push([index, mark]);
  }

  forget(count) {
    const first = { type: "snapshot", version: VERSION, seq: this.events[count].seq, state: this.at(count) };
    const rest = this.events.slice(count + 1);
    this.clear();
    this.forgotten += count;
    this.add(first);
    for (const event of rest) this.add(event);
  }

  at(index) {
    let from = index;
    while (!this.states.has(from)) from -= 1;
    let state = this.states.get(from);
    while (from < index) state = merged(state, this.events[++from].change);
    return state;
  }

  // Tokens a second up to `index`, over the last second of the recording.
  rate(index) {
    let from = index;
    while (from > 0 && this.totals[index].t - this.totals[from].t < 1) from -= 1;
    const seconds = this.totals[index].t - this.totals[from].t;
    return seconds > 0 ? (this.totals[index].output_tokens - this.totals[from].output_tokens) / seconds : 0;
  }

  lines() {
    return this.events.map((event) => JSON.stringify(event) + "\n");
  }
}

// Node text in a line: what has no width of its own is given a sign.
export const plain = (text) => text.replace(/<\|[^|<>]{1,40}\|>/g, "◆").replace(/\r?\n/g, "↵").replace(/\s/g, " ");

// The beginning of a text, at most `most` columns wide: a Chinese character takes two.
export function fit(text, most) {
  let width = 0;
  const out = [];
  for (const character of text) {
    width += character.codePointAt(0) > 0x2e7f ? 2 : 1;
    if (width > most) return out.slice(0, -1).join("") + "…";
    out.push(character);
  }
  return out.join("");
}

const number = new Intl.NumberFormat("en");
export const count = (value) => number.format(value);
export const some = (value, word) => `${count(value)} ${word}${value === 1 ? "" : "s"}`;

const FEW = 2;   // requests told of one by one; more share a line
const names = (ids) => ids.slice(0, 6).map((id) => `#${id}`).join(" ") + (ids.length > 6 ? ` and ${ids.length - 6} more` : "");

// What lies between two states, in words: [[kind, text]]. kind is a class of the page's colours.
export function happened(before, now) {
  const told = [];
  const of = (phase) => Object.keys(now.requests).filter((id) => now.requests[id].phase === phase);
  const tell = (kind, ids, one, many) => {
    if (ids.length > FEW) told.push([kind, many(names(ids))]);
    else for (const id of ids) told.push([kind, one(`#${id}`, now.requests[id], before.requests[id])]);
  };
  tell("queued", Object.keys(now.requests).filter((id) => !(id in before.requests)),
    (name, { prompt }) => `${name} arrives with ${some(prompt, "token")}`, (all) => `${all} arrive`);
  tell("prefill", of("prefill"), (name, request, was) => {
    const found = !was || was.phase === "queued" ? `${request.cached} of ${request.prompt} from the tree, ` : "";
    return `${name} prefill${was?.phase === "retracted" ? " again" : ""}: ${found}${request.new} computed`;
  }, (all) => `prefill: ${all}, ${some(of("prefill").reduce((sum, id) => sum + now.requests[id].new, 0), "token")} computed`);
  tell("retracted", of("retracted").filter((id) => id in before.requests && before.requests[id].phase !== "retracted"),
    (name, request, was) => `${name} retracted: its ${some(was.own, "page")} go back, its ${some(request.out, "token")} of answer stay`,
    (all) => `${all} retracted: their pages go back, their answers stay`);
  tell("done", of("done"), (name, { out }) => `${name} done after ${some(out, "token")}`, (all) => `${all} done`);
  tell("gone", of("aborted"), (name) => `${name} aborted`, (all) => `${all} aborted`);
  if (of("decode").length) told.push(["decode", `decode: a token each for ${names(of("decode"))}`]);
  for (const [upper, lower] of splits(before, now)) {
    told.push(["cut", `split: node ${lower} is cut after ${some(now.nodes[upper].length, "token")}`]);
  }
  const gone = Object.keys(before.nodes).filter((id) => !(id in now.nodes));
  if (gone.length) {
    const freed = gone.reduce((sum, id) => sum + before.nodes[id].length, 0);
    told.push(["gone", `evicted: ${some(gone.length, "node")}, ${some(freed, "token")}`]);
  }
  return told;
}

// [[new upper node, the one that was cut]]: the cut one has got a parent that is new and stands where it stood.
export function splits(before, now) {
  const found = [];
  for (const [id, node] of Object.entries(now.nodes)) {
    const was = before.nodes[id], upper = now.nodes[node.parent];
    if (was && upper && was.parent !== node.parent && !(node.parent in before.nodes)) found.push([String(node.parent), id]);
  }
  return found;
}
