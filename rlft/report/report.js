"use strict";
// ---- the cursor: one step on all curves ----
const figures = [...document.querySelectorAll("figure")].map(f => (
  { figure: f, svg: f.querySelector("svg"), values: [...f.querySelectorAll(".legend b")], at: f.querySelector("output"),
    newest: [...f.querySelectorAll(".legend b")].map(b => b.textContent), ...JSON.parse(f.dataset.curves) }));
const shown = v => v == null ? "-" : Math.abs(v) >= 1000 ? Math.round(v).toLocaleString("en-US") : String(+v.toPrecision(4));
const nearest = (steps, step) => {
  let low = 0, high = steps.length - 1;
  while (high - low > 1) { const middle = (low + high) >> 1; if (steps[middle] < step) low = middle; else high = middle; }
  return Math.abs(steps[high] - step) <= Math.abs(steps[low] - step) ? high : low;
};
function place(f, step) {
  const { first, last, left, right } = f.svg.dataset, width = f.svg.viewBox.baseVal.width;
  return (+left + (step - first) / (last - first) * (right - left)) * width;
}
function point(step) {
  for (const f of figures) {
    const at = f.steps.map(s => nearest(s, step));
    const now = f.steps[0][at[0]], cursor = f.svg.querySelector(".cursor"), x = place(f, now);
    cursor.setAttribute("x1", x); cursor.setAttribute("x2", x);
    f.at.textContent = f.every > 1 ? `steps ${now - f.every + 1} to ${now}` : `step ${now}`;
    f.lines.forEach(([s, v], n) => { f.values[n].textContent = shown(v[at[s]]); });
  }
}
function leave() {
  for (const f of figures) {
    f.at.textContent = "";
    f.values.forEach((b, n) => { b.textContent = f.newest[n]; });
    for (const end of ["x1", "x2"]) f.svg.querySelector(".cursor").setAttribute(end, -9);
  }
}
function stepAt(f, event) {
  const box = f.svg.getBoundingClientRect(), { first, last, left, right } = f.svg.dataset;
  return +first + ((event.clientX - box.left) / box.width - left) / (right - left) * (last - first);
}
for (const f of figures) {
  let waiting = false;
  f.svg.addEventListener("pointermove", e => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; point(stepAt(f, e)); });
  });
  f.svg.addEventListener("pointerleave", () => requestAnimationFrame(leave));
  f.svg.addEventListener("click", e => {
    if (!blocks.length) return;
    choose(nearest(blocks.map(b => +b.dataset.step), stepAt(f, e)));
    document.getElementById("completions").scrollIntoView();
  });
}

// ---- running medians: drawn or not ----
const smooth = document.querySelector("[name=smooth]");
smooth?.addEventListener("change", () => document.body.classList.toggle("raw", !smooth.checked));

// ---- completions: one step at a time, tokens shaded ----
const blocks = [...document.querySelectorAll(".step")], range = document.querySelector(".choose input");
let shade = document.querySelector("[name=shade]:checked")?.value ?? "";
function choose(i) {
  range.value = i;
  const block = blocks[range.value];
  blocks.forEach(b => { b.hidden = b !== block; });
  document.querySelector(".choose output").textContent = block.dataset.step;
  block.querySelectorAll(".passage[data-n]").forEach(split);
  colour(block);
  count();
}
function numbers(list) { return list.split(",").map(v => v === "" ? null : +v); }
function split(passage) {  // one element per token, made when the step is first looked at
  if (passage.tokens) return;
  const whole = passage.firstElementChild, text = whole.textContent;
  const n = numbers(passage.dataset.n), d = numbers(passage.dataset.d), p = numbers(passage.dataset.p);
  let at = 0;
  passage.tokens = n.map((length, i) => {
    const span = document.createElement("span");
    span.textContent = text.slice(at, at += length);
    const token = { span, d: d[i] == null ? null : d[i] / 1e4, p: p[i] == null ? null : p[i] / 1e3 };
    span.title = token.p == null ? "not trained" : `trainer ${token.p.toFixed(3)}` + (token.d == null ? "" :
      `, sampler ${(token.p - token.d).toFixed(3)}, difference ${token.d.toFixed(4)}`);
    return token;
  });
  whole.replaceChildren(...passage.tokens.map(t => t.span));
}
const level = (value, steps) => steps.filter(s => value >= s).length;
function classOf({ d, p }) {
  if (shade === "") return "";
  if (p == null) return "none";
  if (shade === "p") { const k = level(-p, [0.5, 1, 2, 4]); return k ? `u${k}` : ""; }
  const k = d == null ? 0 : level(Math.abs(d), [0.01, 0.05, 0.2, 1]);
  return k ? (d < 0 ? "n" : "p") + k : "";
}
function colour(block) {
  for (const passage of block.querySelectorAll(".passage[data-n]"))
    for (const token of passage.tokens) token.span.className = classOf(token);
}
for (const radio of document.querySelectorAll("[name=shade]"))
  radio.addEventListener("change", () => {
    shade = radio.value;
    for (const scale of document.querySelectorAll("[data-scale]")) scale.hidden = scale.dataset.scale !== shade;
    choose(+range.value);
  });
// ---- search and filter: what does not match is hidden, in every step ----
const query = document.querySelector("[type=search]"), matches = document.querySelector(".matches");
const bound = { from: document.querySelector("[name=from]"), to: document.querySelector("[name=to]") };
let counts = blocks.map(() => 1);
function filter() {
  const words = query.value.toLowerCase(), from = parseFloat(bound.from.value), to = parseFloat(bound.to.value);
  counts = blocks.map(block => {
    let inBlock = 0;
    for (const group of block.querySelectorAll(".group")) {
      const asked = group.querySelector(".prompt").textContent.toLowerCase().includes(words);
      let inGroup = 0;
      for (const sample of group.querySelectorAll(".sample")) {
        const reward = parseFloat(sample.dataset.reward);  // NaN for an invalid one, which no bound lets through
        const within = (isNaN(from) || reward >= from) && (isNaN(to) || reward <= to);
        const match = within && (asked || sample.querySelector(".passage").textContent.toLowerCase().includes(words));
        sample.hidden = !match;
        inGroup += match;
      }
      group.hidden = inGroup === 0;
      inBlock += inGroup;
    }
    return inBlock;
  });
  count();
}
function count() {
  const all = counts.reduce((a, b) => a + b, 0), steps = counts.filter(n => n).length;
  const filtered = query.value !== "" || bound.from.value !== "" || bound.to.value !== "";
  matches.textContent = filtered ? `${counts[+range.value]} in this step, ${all} in ${steps} of the steps here` : "";
}
function move(by) {  // to the next step that has a match
  let i = +range.value + by;
  while (counts[i] === 0) i += by;
  if (i in counts) choose(i);
}
if (range) {
  range.addEventListener("input", () => choose(+range.value));
  for (const b of document.querySelectorAll("[data-move]")) b.addEventListener("click", () => move(+b.dataset.move));
  for (const input of [query, bound.from, bound.to]) input.addEventListener("input", filter);
  choose(+range.value);
}
