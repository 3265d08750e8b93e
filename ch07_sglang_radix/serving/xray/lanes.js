// A lane for each request over the steps: when it waited, was computed, wrote, was sent back. The newest step shown is the last
// column; requests that ended before the first column have left the picture.

import { fit, plain } from "./events.js";
import { color, font, requestColor, sized } from "./paint.js";

const AXIS = 20, LABEL = 200, LABEL_NARROW = 36, NARROW = 620;
const ROW = 19, LEAST_ROW = 14, COLUMN = 11, LEAST_COLUMN = 7;

export class Lanes {
  // pick(request id or null)
  constructor(canvas, box, pick) {
    this.canvas = canvas;
    this.box = box;
    this.rows = [];
    this.row = ROW;
    const at = (event) => this.rows[Math.floor((event.offsetY - AXIS) / this.row)] ?? null;
    for (const kind of ["pointermove", "click"]) canvas.addEventListener(kind, (event) => pick(at(event)));
    canvas.addEventListener("pointerleave", () => pick(null));
  }

  draw(recording, index, picked) {
    const width = this.box.clientWidth, narrow = width < NARROW, label = narrow ? LABEL_NARROW : LABEL;
    const column = narrow ? LEAST_COLUMN : COLUMN, columns = Math.max(8, Math.floor((width - label - 6) / column));
    const first = Math.max(0, index - columns + 1), shown = recording.lanes.slice(first, index + 1);
    const room = Math.max(this.box.clientHeight - AXIS - 2, 4 * ROW);
    const ids = inPicture(shown, Math.floor(room / LEAST_ROW));
    const row = (this.row = Math.max(LEAST_ROW, Math.min(ROW, Math.floor(room / Math.max(ids.length, 1)))));
    this.rows = ids;
    const context = sized(this.canvas, width, AXIS + Math.max(ids.length * row, room));
    context.textBaseline = "middle";
    this.drawAxis(context, recording, first, shown.length, label, column);
    ids.forEach((id, i) => {
      const y = AXIS + i * row;
      if (picked.has(`r${id}`)) {
        context.fillStyle = color("picked");
        context.fillRect(0, y, width, row);
      }
      this.drawLabel(context, id, y, row, label, recording.says.get(id) ?? "");
      shown.forEach((lane, step) => lane.has(id) && drawCell(context, label + step * column, y, column, row, ...lane.get(id)));
    });
    return ids.length;
  }

  // Under each step its kind, and its number now and then.
  drawAxis(context, recording, first, steps, label, column) {
    font(context, 10);
    context.textAlign = "center";
    for (let i = 0; i < steps; i += 1) {
      const { kind, step } = recording.totals[first + i];
      const x = label + i * column;
      context.fillStyle = color(kind === "several" ? "decode" : kind);
      context.globalAlpha = kind === "settle" ? 0.35 : 1;
      context.fillRect(x + 0.5, AXIS - 6, column - 1, 3);
      context.globalAlpha = 1;
      if (step % 10 === 0 && kind !== "settle") {
        context.fillStyle = color("muted");
        context.fillText(String(step), x + column / 2, 6);
      }
    }
    context.fillStyle = color("muted");
    context.textAlign = "left";
    context.fillText("step", 2, 6);
  }

  drawLabel(context, id, y, row, label, says) {
    const size = Math.min(12, row - 2);
    context.fillStyle = requestColor(id);
    context.beginPath();
    context.roundRect(1, y + 2, 30, row - 4, 4);
    context.fill();
    font(context, size - 1, "600");
    context.textAlign = "center";
    context.fillStyle = color("on-color");
    context.fillText(String(id), 16, y + row / 2 + 0.5);
    if (label === LABEL_NARROW) return;
    font(context, size);
    context.textAlign = "left";
    context.fillStyle = color("text");
    context.fillText(fit(question(says), Math.floor((label - 42) / (size * 0.602))), 36, y + row / 2 + 0.5);
  }
}

// Requests of these steps, by age; where they are more than `most`, without those that ended first.
function inPicture(lanes, most) {
  const last = new Map();
  lanes.forEach((lane, i) => { for (const id of lane.keys()) last.set(id, i); });
  const ended = [...last].filter(([, i]) => i < lanes.length - 1).sort((a, b) => a[1] - b[1]).map(([id]) => id);
  const left = new Set(ended.slice(0, Math.max(0, last.size - most)));
  return [...last.keys()].filter((id) => !left.has(id)).sort((a, b) => a - b);
}

// What a prompt asks: the last line of it that is not the beginning of the answer.
export function question(says) {
  const lines = says.split(/\r?\n/).map((line) => line.trim()).filter((line) => line && !/^(assistant|user|system)$/.test(line));
  return plain(lines[lines.length - 1] ?? "");
}

function drawCell(context, x, y, column, row, phase) {
  const middle = y + row / 2, width = column - 1;
  context.fillStyle = color(phase);
  if (phase === "prefill") context.fillRect(x, y + 2, width, row - 4);
  else if (phase === "decode") context.fillRect(x, y + row * 0.26, width, row * 0.48);
  else if (phase === "stands") context.fillRect(x, middle - 1, column, 2);
  else if (phase === "queued") context.fillRect(x + column / 2 - 1.5, middle - 1.5, 3, 3);
  else if (phase === "retracted") {
    context.globalAlpha = 0.25;
    context.fillRect(x, y + 2, column, row - 4);
    context.globalAlpha = 1;
    context.strokeStyle = color(phase);
    context.lineWidth = 1.5;
    context.beginPath();
    context.moveTo(x + 1, y + row - 3);
    context.lineTo(x + width, y + 3);
    context.stroke();
  } else {   // done, aborted
    context.strokeStyle = color(phase);
    context.lineWidth = 1.8;
    context.beginPath();
    if (phase === "done") {
      context.moveTo(x + 1, middle);
      context.lineTo(x + column * 0.4, middle + 3);
      context.lineTo(x + width, middle - 3.5);
    } else {
      for (const side of [1, -1]) {
        context.moveTo(x + 1.5, middle - 3 * side);
        context.lineTo(x + width - 1, middle + 3 * side);
      }
    }
    context.stroke();
  }
}
