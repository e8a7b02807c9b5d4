// Confidence-guided annealing on the weights of a network: which the boundary range holds, and which may still move.
import { annealing } from "./maths.js";
import { LATENTS } from "./latents.js";
import { axes, html, shown, slider, stage, svg } from "./kit.js";

const RANGES = [1, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 400, 500].map((k) => k / 1000);
let clips = 0;

export function render({ el }) {
  const state = { boundary: 0.005, reach: 0.05 };
  const set = (key) => (value) => ((state[key] = value), view.redraw());
  const range = (label, key) => slider(label, { min: 0, max: RANGES.length - 1, step: 1, value: RANGES.indexOf(state[key]),
    format: (i) => shown(RANGES[i], 3), change: (i) => set(key)(RANGES[i]) });
  const controls = [
    range("boundary range", "boundary"),
    range("reach", "reach"),
  ];

  function draw(width) {
    const { counts, within } = LATENTS;
    const total = counts.reduce((a, b) => a + b);
    const found = annealing(within, state.boundary, state.reach);
    const percent = (count) => `${shown((100 * count) / total, count && count < total / 100 ? 2 : 1)} %`;
    const sentence = `At a boundary range of ${shown(state.boundary, 3)}, ${percent(found.mayMove)} of ${total.toLocaleString("en")} weights may move; the others are held. `
      + (state.reach <= state.boundary
        ? "The reach is not longer than the boundary range, so the mask holds only weights that could not have reached a threshold anyway."
        : `With a reach of ${shown(state.reach, 3)}, ${percent(found.unmasked)} could reach a threshold without the mask, and ${percent(found.mayFlip)} with it.`);
    const row = (name, count) => html("tr", {}, html("th", { scope: "row" }, name), html("td", {}, count.toLocaleString("en")), html("td", {}, percent(count)));
    const table = html("table", {},
      html("thead", {}, html("tr", {}, ...["weights", "count", "share"].map((text) => html("th", { scope: "col" }, text)))),
      html("tbody", {}, row("held", total - found.mayMove), row("may move", found.mayMove), row("may move and reach a threshold", found.mayFlip),
        row("would reach one without the mask", found.unmasked)));
    return { picture: [histogram(counts, total, state.boundary, width), table], sentence };
  }

  const view = stage(el, { title: "What annealing holds", controls, draw });
  return view.close;
}

/** The weights by y = 2·w/s: outlined where they are held, filled where they may move. The end bins hold clipped weights. */
function histogram(counts, total, boundary, width) {
  const share = counts.map((c) => (100 * c) / total), bin = 4 / counts.length;
  const top = Math.max(...share.slice(1, -1)) * 1.25;
  const at = axes({ width, height: 220, xRange: [-2, 2], yRange: [0, top], xTicks: [-2, -1, 0, 1, 2], yTicks: [0, 0.5], xName: "y = 2 · weight / scale; thresholds at −1, 0, 1",
    yName: "weights in a bin of 0.025, %", top: 44 });
  const outline = `M${at.x(-2)},${at.y(0)}` + share.map((v, i) => `V${at.y(Math.min(v, top)).toFixed(1)}H${at.x(-2 + (i + 1) * bin).toFixed(1)}`).join("") + `V${at.y(0)}Z`;
  const clip = `lowbit-clip-${clips++}-${Math.random().toString(36).slice(2)}`;
  const half = Math.max(at.x(boundary) - at.x(0), 0.75); // a zone stays visible when it is thinner than a pixel
  const zone = (k) => ({ x: at.x(k) - half, y: at.y(top), width: 2 * half, height: at.y(0) - at.y(top) });
  return svg("svg", { viewBox: `0 0 ${width} 220`, height: 220, role: "img", "aria-label": "Histogram of the latent weights around the three thresholds; filled zones may move" },
    svg("clipPath", { id: clip }, ...[-1, 0, 1].map((k) => svg("rect", zone(k)))),
    at.frame,
    ...[-1, 0, 1].map((k) => svg("line", { x1: at.x(k), x2: at.x(k), y1: at.y(top), y2: at.y(0), stroke: "var(--ink)", "stroke-dasharray": "5 4", "stroke-width": 1 })),
    svg("path", { d: outline, fill: "none", stroke: "var(--rule)", "stroke-width": 1 }),
    svg("path", { d: outline, fill: "var(--orange)", "clip-path": `url(#${clip})` }),
    svg("rect", { x: 44, y: 21, width: 14, height: 10, fill: "var(--orange)" }), svg("text", { x: 63, y: 30 }, "filled: may move"),
    svg("rect", { x: 170, y: 21, width: 14, height: 10, fill: "none", stroke: "var(--rule)" }), svg("text", { x: 189, y: 30 }, "outlined: held"));
}

export default { render };
