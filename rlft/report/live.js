"use strict";
// ---- a served page: look for a new version, and show it at the same place ----
const version = document.body.dataset.version, KEPT = "rlft-place";
const folds = () => [...document.querySelectorAll("details")];
function keep() {
  const last = !range || +range.value === blocks.length - 1;
  const state = { y: scrollY, open: folds().map(d => d.open), step: last ? null : blocks[range.value].dataset.step,
    shade: document.querySelector("[name=shade]:checked")?.value };
  sessionStorage.setItem(KEPT, JSON.stringify(state));
}
function restore() {
  const state = JSON.parse(sessionStorage.getItem(KEPT) ?? "null");
  sessionStorage.removeItem(KEPT);
  if (!state) return;
  folds().forEach((d, i) => { if (i in state.open) d.open = state.open[i]; });
  const radio = [...document.querySelectorAll("[name=shade]")].find(r => r.value === state.shade);
  if (radio) { radio.checked = true; radio.dispatchEvent(new Event("change")); }
  const at = blocks.findIndex(b => b.dataset.step === state.step);
  if (at >= 0) choose(at);
  scrollTo(0, state.y);
}
async function look() {
  try {
    const answer = await fetch("/", { method: "HEAD", cache: "no-store" });
    if (answer.ok && answer.headers.get("ETag") !== `"${version}"`) { keep(); location.reload(); return; }
  } catch { /* the server has ended: the page stays as it is */ }
  setTimeout(look, 3000);
}
restore();
setTimeout(look, 3000);
