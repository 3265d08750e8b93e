// What the canvases share: sharp pixels on any screen, and the colours of xray.css, which know whether it is dark.

const probe = document.createElement("span");
let known = new Map();

// The colour behind a CSS variable, as the theme of this moment has it.
export function color(name) {
  if (!known.has(name)) {
    if (!probe.isConnected) {
      probe.hidden = true;
      document.body.append(probe);
    }
    probe.style.color = `var(--${name})`;
    known.set(name, getComputedStyle(probe).color);
  }
  return known.get(name);
}

export function themeChanged() {
  known = new Map();
}

export const requestColor = (id) => color(`c${id % 8}`);

// Empties a canvas and gives it a size in CSS pixels; returns a context that draws in them.
export function sized(canvas, width, height) {
  const scale = window.devicePixelRatio || 1;
  const [w, h] = [Math.round(width * scale), Math.round(height * scale)];
  if (canvas.width !== w || canvas.height !== h) {
    canvas.width = w;
    canvas.height = h;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
  }
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

export function font(context, size, weight = "") {
  context.font = `${weight} ${size}px ui-monospace, "SF Mono", "DejaVu Sans Mono", Menlo, Consolas, monospace`.trim();
}

// A line of the last values, without axes: how it goes, not how much it is.
export function sparkline(canvas, values, name) {
  canvas.removeAttribute("style");   // its size is the style sheet's
  const width = canvas.clientWidth || 80, height = canvas.clientHeight || 24;
  const context = sized(canvas, width, height);
  if (values.length < 2) return;
  const most = Math.max(...values, 1e-9);
  const x = (i) => (i / (values.length - 1)) * (width - 4) + 2, y = (value) => height - 3 - (value / most) * (height - 6);
  context.beginPath();
  values.forEach((value, i) => (i ? context.lineTo(x(i), y(value)) : context.moveTo(x(i), y(value))));
  context.strokeStyle = color(name);
  context.lineWidth = 1.5;
  context.lineJoin = "round";
  context.stroke();
  context.lineTo(x(values.length - 1), height);
  context.lineTo(x(0), height);
  context.globalAlpha = 0.14;
  context.fillStyle = color(name);
  context.fill();
  context.globalAlpha = 1;
}
