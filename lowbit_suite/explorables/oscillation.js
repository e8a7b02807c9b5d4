// One weight that oscillates: its latent, the boundaries, and how often it turns back, beside 2·min(d, 1 - d).
import { causes, expectedFrequency, reversals, train } from "./maths.js";
import { axes, choice, line, shown, slider, stage, svg } from "./kit.js";

const SETTLE = 1000, MEASURED = 2000, PICTURED = 60;

export function render({ el }) {
  const state = { optimum: 0.3, rate: 0.1, scale: "fixed" };
  const set = (key) => (value) => ((state[key] = value), view.redraw());
  const controls = [
    slider("optimum t", { min: 0, max: 2, step: 0.05, value: state.optimum, change: set("optimum") }),
    slider("learning rate", { min: -2, max: -0.5, step: 0.1, value: -1, format: (power) => shown(10 ** power, 3), change: (power) => set("rate")(10 ** power) }),
    choice("Scale", { options: { fixed: "fixed at 1", learned: "learned, shared by a row of 16" }, value: state.scale, change: set("scale") }),
  ];

  function draw(width) {
    const all = train(state.optimum, state.rate, state.scale === "learned", SETTLE + MEASURED);
    const tail = (list, count) => list.slice(-count);
    const last = { latents: tail(all.latents, MEASURED), codes: tail(all.codes, MEASURED), scales: tail(all.scales, MEASURED) };
    const frequency = tail(reversals(all.codes), MEASURED).reduce((a, b) => a + b) / MEASURED;
    const scale = last.scales.reduce((a, b) => a + b) / MEASURED;
    const { changes, byScale } = causes(last);
    const shownSteps = Object.fromEntries(Object.entries(last).map(([key, list]) => [key, tail(list, PICTURED)]));
    const sentence = `Measured over ${MEASURED} steps: ${shown(frequency)} reversals a step. `
      + (state.scale === "fixed"
        ? `The formula 2·min(d, 1 − d) gives ${shown(expectedFrequency(state.optimum))}, whatever the learning rate.`
        : `The formula gives ${shown(expectedFrequency(state.optimum))} for a scale of 1 and ${shown(expectedFrequency(state.optimum, scale))} for the learned one, ${shown(scale, 3)} on average. `
          + `Of ${changes} changes of level the scale alone brought about ${byScale}: the boundary walked over the weight.`);
    return { picture: paths(shownSteps, state.optimum, width), sentence };
  }

  const view = stage(el, { title: "One weight that cannot settle", controls, draw });
  return view.close;
}

/** Above the weight between its levels, below the latent and its boundary from near. */
function paths({ latents, codes, scales }, optimum, width) {
  const steps = latents.map((_, i) => i);
  const levels = codes.map((k, i) => k * scales[i]);
  const low = Math.min(...levels, optimum), high = Math.max(...levels, optimum);
  const boundary = Math.floor(latents.at(-1) / scales.at(-1)) + 0.5;
  const edge = scales.map((s) => boundary * s);
  const staircase = (list, at) => list.flatMap((v, i) => [[at.x(i), at.y(v)], [at.x(i + 1), at.y(v)]]);
  const common = { width, xRange: [0, steps.length], xTicks: [0, 20, 40, 60] };

  const far = axes({ ...common, height: 200, yRange: [low - 0.35, high + 0.35], yTicks: [...new Set(codes)].sort().map((k) => k * scales.at(-1)),
    tick: (v) => String(Math.round(v * 100) / 100), xName: "training step (the last 60)", yName: "weight" });
  const inside = [-1, 0, 1].map((k) => k + boundary).filter((b) => b * scales[0] > low - 0.3 && b * scales[0] < high + 0.3);
  const overview = svg("svg", { viewBox: `0 0 ${width} 200`, height: 200, role: "img", "aria-label": "The level in use jumps between levels while the latent weight stays near a boundary" },
    far.frame,
    ...inside.map((b) => line(scales.map((s, i) => [far.x(i), far.y(b * s)]), "ink", { dash: "6 4", thick: 1 })),
    line([[far.x(0), far.y(optimum)], [far.x(steps.length), far.y(optimum)]], "green", { dash: "2 3", thick: 2 }),
    line(staircase(levels, far), "blue"),
    line(steps.map((i) => [far.x(i), far.y(latents[i])]), "orange", { thick: 2.4 }));

  const from = Math.min(...latents, ...edge), to = Math.max(...latents, ...edge), margin = 0.15 * (to - from) || 0.05;
  const near = axes({ ...common, height: 150, yRange: [from - margin, to + margin], yTicks: [from, to],
    tick: (v) => (Number.isInteger(v) ? String(v) : v.toFixed(3)), xName: "training step", yName: "from near: latent weight and boundary" });
  const zoom = svg("svg", { viewBox: `0 0 ${width} 150`, height: 150, role: "img", "aria-label": "The latent weight crosses its boundary again and again; with a learned scale the boundary moves too" },
    near.frame,
    line(edge.map((v, i) => [near.x(i), near.y(v)]), "ink", { dash: "6 4", thick: 1.4 }),
    line(steps.map((i) => [near.x(i), near.y(latents[i])]), "orange"),
    ...steps.map((i) => svg("circle", { cx: near.x(i), cy: near.y(latents[i]), r: 2, fill: "var(--orange)" })));
  return [overview, legend(width), zoom];
}

function legend(width) {
  const entries = [["level in use", "blue", undefined, 1.6], ["latent weight", "orange", undefined, 2.4], ["boundary", "ink", "6 4", 1], ["optimum", "green", "2 3", 2]];
  const columns = width < 520 ? 2 : 4, height = 20 * (4 / columns);
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, height, "aria-hidden": "true" }, ...entries.flatMap(([name, color, dash, thick], i) => {
    const x = (i % columns) * (width / columns), y = 12 + 20 * Math.floor(i / columns);
    return [line([[x, y - 4], [x + 26, y - 4]], color, { dash, thick }), svg("text", { x: x + 32, y }, name)];
  }));
}

export default { render };
