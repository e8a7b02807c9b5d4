// Drag the latents of one DenseShift weight: its value, the run of open gates, the gradient of each latent.
import { denseshift } from "./maths.js";
import { choice, line, shown, slider, stage, svg } from "./kit.js";

const GATES = { 2: 1, 3: 3, 4: 7 };
const SUBSCRIPTS = "₁₂₃₄₅₆₇", SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷";

export function render({ el }) {
  const state = { bits: 3, sign: -0.7, gates: [-0.4, 0.3, 0.6, -0.2, 0.5, 0.1, 0.7], gradient: 1, surrogate: "sqrt" };
  const set = (key) => (value) => ((state[key] = value), view.redraw());

  function controls() {
    const latent = (label, value, change) => slider(label, { min: -1, max: 1, step: 0.05, value, change });
    const gates = state.gates.slice(0, GATES[state.bits]);
    return [
      choice("Bits", { options: { 2: "2", 3: "3", 4: "4" }, value: String(state.bits), change: (bits) => {
        state.bits = Number(bits);
        view.setControls(controls());
        panelFocus(`input[value="${bits}"]`);
        view.redraw();
      } }),
      choice("Surrogate", { options: { sqrt: "square root", identity: "true power" }, value: state.surrogate, change: set("surrogate") }),
      slider("G = ∂L/∂w", { min: -2, max: 2, step: 0.1, value: state.gradient, change: set("gradient") }),
      latent("sign latent", state.sign, set("sign")),
      ...gates.map((t, k) => latent(`gate t${SUBSCRIPTS[k]}`, t, (value) => ((state.gates[k] = value), view.redraw()))),
    ];
  }
  const panelFocus = (selector) => el.querySelector(selector)?.focus();

  function draw(width) {
    const gates = state.gates.slice(0, GATES[state.bits]);
    const now = denseshift(state.sign, gates, state.gradient, state.surrogate);
    const run = now.exponent;
    const names = gates.map((_, k) => `t${SUBSCRIPTS[k]}`).slice(gates.length - run);
    const sentence = `The weight is ${shown(now.weight, 0)}: sign ${now.weight > 0 ? "+" : "−"}, and `
      + (run ? `${run} open gate${run > 1 ? "s" : ""} at the end of the chain (${names.join(", ")}), so its size is 2${SUPERSCRIPTS[run]}. ` : "its last gate is closed, so its size is 2⁰. ")
      + `Gradients: sign ${shown(now.signGradient)}, ${now.gateGradients.map((g, k) => `t${SUBSCRIPTS[k]} ${shown(g)}`).join(", ")}.`;
    return { picture: [levels(now, gates.length, width), chain(state.sign, gates, now, width)], sentence };
  }

  const view = stage(el, { title: "A DenseShift weight and its gates", controls: controls(), draw });
  return view.close;
}

/** All values of the weight on a line, evenly spaced; the present one in a box. */
function levels(now, count, width) {
  const powers = Array.from({ length: count + 1 }, (_, p) => 2 ** p);
  const values = [...powers.toReversed().map((v) => -v), ...powers];
  const x = (i) => 20 + (i * (width - 40)) / (values.length - 1);
  const here = values.indexOf(now.weight);
  const sparse = width / values.length < 34;
  return svg("svg", { viewBox: `0 0 ${width} 44`, height: 44, role: "img", "aria-label": "The values that the weight can take, with its present value" },
    svg("line", { x1: 20, x2: width - 20, y1: 14, y2: 14, stroke: "var(--rule)" }),
    ...values.map((_, i) => svg("circle", { cx: x(i), cy: 14, r: 3, fill: "var(--rule)" })),
    svg("circle", { cx: x(here), cy: 14, r: 7, fill: "var(--blue)" }),
    ...values.map((v, i) => (i === here || (!(sparse && i % 2) && !(sparse && Math.abs(i - here) < 2))
      ? svg("text", { x: x(i), y: 38, "text-anchor": "middle", class: i === here ? "" : "quiet", "font-weight": i === here ? "bold" : "normal" }, shown(v, 0)) : "")));
}

/** One column a latent: its state, its count S_k, and its gradient as a bar. */
function chain(sign, gates, now, width) {
  const column = (width - 4) / (gates.length + 1), box = Math.min(column - 6, 64), zero = 128;
  const gradients = [now.signGradient, ...now.gateGradients];
  const unit = 40 / Math.max(2, ...gradients.map(Math.abs));
  const parts = [svg("text", { x: 0, y: 84, class: "quiet" }, `gradient of each latent`)];
  gradients.forEach((gradient, i) => {
    const middle = 2 + column * (i + 0.5), open = i > 0 && gates[i - 1] > 0, inRun = i > gates.length - now.exponent;
    const label = i === 0 ? (sign >= 0 ? "+" : "−") : open ? "open" : narrow(column) ? "shut" : "closed";
    parts.push(
      svg("rect", { x: middle - box / 2, y: 18, width: box, height: 26, rx: 4, stroke: inRun ? "var(--blue)" : "var(--rule)", "stroke-width": inRun ? 3 : 1,
        fill: "none", "stroke-dasharray": i > 0 && !open ? "3 3" : undefined }),
      svg("text", { x: middle, y: 35, "text-anchor": "middle", "font-weight": inRun ? "bold" : "normal" }, label),
      svg("text", { x: middle, y: 12, "text-anchor": "middle" }, i === 0 ? "sign" : `t${SUBSCRIPTS[i - 1]}`),
      svg("text", { x: middle, y: 62, "text-anchor": "middle", class: "quiet" }, i === 0 ? "" : narrow(column) ? `S ${now.counts[i]}` : `S${SUBSCRIPTS[i - 1]} = ${now.counts[i]}`),
      svg("rect", { x: middle - box / 4, y: gradient > 0 ? zero - gradient * unit : zero, width: box / 2, height: Math.abs(gradient) * unit, fill: "var(--orange)" }),
      svg("text", { x: middle, y: gradient > 0 ? zero + 14 : zero - 5, "text-anchor": "middle" }, shown(gradient)));
  });
  return svg("svg", { viewBox: `0 0 ${width} 172`, height: 172, role: "img", "aria-label": "The chain of gates; heavy frames mark the run of open gates at its end; bars show the gradient of each latent" },
    ...parts, line([[2, zero], [width - 2, zero]], "rule", { thick: 1 }));
}

const narrow = (column) => column < 56;

export default { render };
