// The page pool as a grid, a cell a page (or several of a large pool). Who owns a page is its colour; a frame says that the
// step has taken it (green) or given it back (red).

import { color, font, requestColor, sized } from "./paint.js";

const LARGEST = 26, SMALLEST = 5, WITH_NUMBER = 15, SPACE = 2;

// "free", "evictable", "protected", "request" or "other", and whose it is.
export function ownerOf(state, cell) {
  const owner = state.pages[cell];
  if (owner === undefined) return { kind: "free" };
  if (owner[0] === "r") return { kind: "request", id: Number(owner.slice(1)) };
  if (owner[0] !== "n") return { kind: "other" };
  const node = state.nodes[owner.slice(1)];
  return { kind: node && node.lock ? "protected" : "evictable", node: owner.slice(1) };
}

// How many pages of each kind, by the counts and not by the cells: these are exact for any pool.
export function shares(state) {
  const { about, totals } = state;
  const own = about.max_total_num_tokens - totals.free_tokens - totals.evictable_tokens - totals.protected_tokens;
  const pages = (tokens) => tokens / about.page_size;
  return { protected: pages(totals.protected_tokens), request: pages(own), evictable: pages(totals.evictable_tokens), free: pages(totals.free_tokens) };
}

export class Pool {
  // pick(cell or null)
  constructor(canvas, box, pick) {
    this.canvas = canvas;
    this.box = box;
    this.grid = { columns: 1, size: LARGEST };
    const cellAt = (event) => {
      const { columns, size } = this.grid;
      const column = Math.floor(event.offsetX / size), cell = Math.floor(event.offsetY / size) * columns + column;
      return column < columns && cell < (this.cells ?? 0) ? cell : null;
    };
    for (const kind of ["pointermove", "click"]) canvas.addEventListener(kind, (event) => pick(cellAt(event)));
    canvas.addEventListener("pointerleave", () => pick(null));
  }

  draw(before, now, picked) {
    const cells = (this.cells = now.about.cells), width = this.box.clientWidth;
    const height = Math.max(this.box.clientHeight, 110);
    let size = LARGEST;
    while (size > SMALLEST && Math.ceil(cells / Math.floor(width / size)) * size > height) size -= 1;
    const columns = Math.max(1, Math.floor(width / size)), rows = Math.ceil(cells / columns);
    this.grid = { columns, size };
    const context = sized(this.canvas, width, rows * size);
    font(context, size >= 20 ? 10 : 9, "600");
    context.textAlign = "center";
    context.textBaseline = "middle";
    for (let cell = 0; cell < cells; cell += 1) {
      const x = (cell % columns) * size, y = Math.floor(cell / columns) * size;
      this.drawCell(context, x, y, size - (size > 8 ? SPACE : 1), ownerOf(now, cell));
      const old = before.pages[cell], owner = now.pages[cell];
      const news = old === owner ? null : owner === undefined ? "gone" : old === undefined ? "fresh" : null;
      if (news) frame(context, x, y, size, color(news));
      if (picked.has(owner)) frame(context, x, y, size, color("text"));
    }
  }

  drawCell(context, x, y, size, owner) {
    const radius = Math.min(3, size / 4);
    context.beginPath();
    context.roundRect(x + 1, y + 1, size - 1, size - 1, radius);
    if (owner.kind === "free") {
      context.strokeStyle = color("free");
      context.lineWidth = 1;
      context.stroke();
      return;
    }
    context.fillStyle = owner.kind === "request" ? requestColor(owner.id) : color(owner.kind);
    context.fill();
    if (size < WITH_NUMBER - SPACE) return;
    context.fillStyle = color("on-color");
    if (owner.kind === "request") context.fillText(String(owner.id % 1000), x + size / 2 + 0.5, y + size / 2 + 1);
    else if (owner.kind === "protected") lock(context, x + size / 2 + 0.5, y + size / 2 + 0.5);
  }
}

function frame(context, x, y, size, stroke) {
  context.strokeStyle = stroke;
  context.lineWidth = size > 8 ? 2 : 1;
  context.strokeRect(x + 0.5, y + 0.5, size - 2, size - 2);
}

function lock(context, x, y) {
  context.fillRect(x - 3, y - 0.5, 6, 4.5);
  context.beginPath();
  context.arc(x, y - 0.5, 2, Math.PI, 0);
  context.lineWidth = 1.2;
  context.strokeStyle = context.fillStyle;
  context.stroke();
}
