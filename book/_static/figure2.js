/* Figure 2 with points to drag (book/method.md). The numbers are those of adaptive_margins.losses.margins_and_targets, with
   which a test compares them. Without this script the page has the drawing of book/loss_figures.py. */

const dot = (a, b) => a.reduce((sum, x, i) => sum + x * b[i], 0);
const cosine = (a, b) => dot(a, b) / (Math.sqrt(dot(a, a) * dot(b, b)) || 1);

/* Margins and targets of triples (rows of q, p and n), as nested arrays of the shapes that Python has. */
function marginsAndTargets(q, p, n, target, inBatch = false) {
  const own = q.map((x, i) => cosine(x, p[i]));
  const triple = q.map((x, i) => own[i] - cosine(x, n[i]));
  const scaled = p.map(x => n.map(y => (1 + cosine(x, y)) / 2));
  let margins = triple;
  if (inBatch) margins = q.map((x, i) => n.map(y => own[i] - cosine(x, y)));
  else if (target === "distributed") margins = triple.map(margin => [margin]);
  let targets = scaled;
  if (typeof target === "number") targets = target;
  else if (target === "adaptive" && !inBatch) targets = scaled.map((row, i) => row[i]);
  return {margins, targets};
}

/* The query's terms: margin and target for each negative; in (c) only the first one is the query's. */
function terms(angles, target) {
  const [q, p, ...n] = angles.map(a => [Math.cos(a * Math.PI / 180), Math.sin(a * Math.PI / 180)]);
  const same = x => n.map(() => x);
  const {margins, targets} = marginsAndTargets(same(q), same(p), n, target);
  const margin = n.map((_, i) => target === "distributed" ? margins[0][0] : margins[i]);
  const wanted = n.map((_, i) => target === "distributed" ? targets[0][i] : target === "adaptive" ? targets[i] : targets);
  return {similarity: cosine(q, p), margin, wanted};
}

function loss(angles, target) {
  const {margin, wanted} = terms(angles, target);
  return margin.reduce((sum, x, i) => sum + (x - wanted[i]) ** 2, 0) / margin.length;
}

/* Change of the loss when a point moves along the circle, per radian. */
function slope(angles, target, i) {
  const step = 1e-4;
  const moved = by => loss(angles.map((a, j) => j === i ? a + by * 180 / Math.PI : a), target);
  return (moved(step) - moved(-step)) / (2 * step);
}

if (typeof document === "undefined") {
  module.exports = {marginsAndTargets, terms, slope};
} else {
  document.addEventListener("DOMContentLoaded", () => document.querySelectorAll("img.am-figure2").forEach(replace));
}

const NAMES = ["q", "d⁺", "d⁻₁", "d⁻₂", "d⁻₃"];
const PANELS = ["static", "adaptive", "distributed"];

function replace(image) {
  const state = {angles: [90, 66, 140, 48, -18], epsilon: 0.5};
  const box = document.createElement("div");
  box.className = "am-figure2-panels";
  const panels = PANELS.map(name => panel(name, state, () => panels.forEach(draw => draw())));
  const slider = document.createElement("label");
  slider.innerHTML = 'Drag a point, or turn it with the arrow keys. Static target ε <input type="range" min="0" max="1" step="0.05"> <output></output>';
  const [input, output] = slider.children;
  input.value = state.epsilon;
  output.textContent = state.epsilon;
  input.addEventListener("input", () => {
    state.epsilon = Number(input.value);
    output.textContent = input.value;
    panels.forEach(draw => draw());
  });
  box.append(...panels.map(draw => draw.element), slider);
  (image.closest("a") ?? image).replaceWith(box);
  panels.forEach(draw => draw());
}

function svg(kind, attributes, parent) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", kind);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  parent?.append(element);
  return element;
}

/* One target: a function that draws the state again; its element has the drawing and its numbers. */
function panel(name, state, changed) {
  const element = document.createElement("div");
  const title = document.createElement("strong");
  title.textContent = name;
  const drawing = svg("svg", {viewBox: "-1.45 -1.45 2.9 2.9", role: "group", "aria-label": `${name} targets`});
  const numbers = document.createElement("p");
  element.append(title, drawing, numbers);
  svg("circle", {r: 1, class: "am-circle"}, drawing);
  const below = svg("g", {}, drawing);
  const points = NAMES.map((label, i) => {
    const point = svg("g", {tabindex: 0, role: "slider", "aria-label": label, class: "am-handle"}, drawing);
    svg("circle", {r: 0.19, class: "am-grip"}, point);
    svg("circle", {r: 0.06}, point);
    svg("text", {class: "am-name"}, point).textContent = label;
    const turn = angle => {
      state.angles[i] = Math.round((angle + 540) % 360 - 180);
      changed();
    };
    point.addEventListener("keydown", event => {
      const by = {ArrowLeft: 2, ArrowUp: 2, ArrowRight: -2, ArrowDown: -2}[event.key];
      if (!by) return;
      event.preventDefault();
      turn(state.angles[i] + by);
    });
    point.addEventListener("pointerdown", event => point.setPointerCapture(event.pointerId));
    point.addEventListener("pointermove", event => {
      if (!point.hasPointerCapture(event.pointerId)) return;
      const frame = drawing.getBoundingClientRect();
      const x = event.clientX - frame.left - frame.width / 2, y = event.clientY - frame.top - frame.height / 2;
      turn(Math.atan2(-y, x) * 180 / Math.PI);
    });
    return point;
  });

  function draw() {
    const target = name === "static" ? state.epsilon : name;
    const {similarity, margin, wanted} = terms(state.angles, target);
    const levels = wanted.map(t => similarity - t);
    below.replaceChildren();
    targets(below, name, state.angles, levels);
    const slopes = wanted.map((_, j) => slope(state.angles, target, j + 2));
    const longest = Math.max(...slopes.map(Math.abs), 1e-9);
    state.angles.forEach((angle, i) => place(points[i], angle));
    slopes.forEach((s, j) => arrow(below, state.angles[j + 2], -Math.sign(s) * Math.sqrt(Math.abs(s) / longest)));
    const rows = name === "distributed" ? [0] : margin.keys();
    const list = values => values.map(x => x.toFixed(2)).join(", ");
    numbers.textContent = `margin ${list([...rows].map(j => margin[j]))}; target `
      + (name === "static" ? list([state.epsilon]) : list(wanted)) + `; loss ${loss(state.angles, target).toFixed(3)}`;
  }
  draw.element = element;
  return draw;
}

function place(point, angle) {
  const x = Math.cos(angle * Math.PI / 180), y = -Math.sin(angle * Math.PI / 180);
  for (const circle of point.querySelectorAll("circle")) {
    circle.setAttribute("cx", x);
    circle.setAttribute("cy", y);
  }
  const text = point.querySelector("text");
  text.setAttribute("x", 1.24 * x);
  text.setAttribute("y", 1.24 * y + 0.06);
  for (const [name, value] of [["valuenow", angle], ["valuemin", -180], ["valuemax", 180], ["valuetext", `${angle}°`]]) {
    point.setAttribute(`aria-${name}`, value);
  }
}

/* Green: where a target wants a negative. Heights are similarities to the query, seen along its direction. */
function targets(parent, name, angles, levels) {
  const group = svg("g", {transform: `rotate(${90 - angles[0]})`, class: "am-target"}, parent);
  const width = level => Math.sqrt(Math.max(0, 1 - level ** 2));
  const line = level => svg("line", {x1: -width(level), x2: width(level), y1: -level, y2: -level}, group);
  if (name === "static") return line(levels[0]);
  if (name === "adaptive") {
    levels.forEach((level, j) => {
      const side = Math.sin((angles[0] - angles[j + 2]) * Math.PI / 180) < 0 ? -1 : 1;
      if (Math.abs(level) <= 1) svg("circle", {cx: side * width(level), cy: -level, r: 0.07}, group);
    });
    return null;
  }
  const [low, high] = [Math.min(...levels), Math.max(...levels)].map(level => Math.max(-1, Math.min(1, level)));
  const steps = [...Array(21).keys()].map(i => low + (high - low) * i / 20);
  const right = steps.map(y => `${width(y)},${-y}`), left = steps.map(y => `${-width(y)},${-y}`).reverse();
  svg("polygon", {points: [...right, ...left].join(" "), class: "am-band"}, group);
  return line(levels.reduce((sum, level) => sum + level, 0) / levels.length);
}

/* Along the tangent, as a straight arrow whose length goes with the square root of the gradient. */
function arrow(parent, angle, length) {
  if (Math.abs(length) < 0.05) return;
  const group = svg("g", {transform: `rotate(${-angle}) translate(1 0) rotate(${length > 0 ? -90 : 90})`, class: "am-push"}, parent);
  const end = 0.47 * Math.abs(length);
  svg("line", {x2: end}, group);
  svg("path", {d: `M${end + 0.05} 0 l-0.12 -0.06 v0.12 z`}, group);
}
