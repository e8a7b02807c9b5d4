// Turn a 2×2 query matrix: the gradient of the keys with rounded factors, and with one rounded product.
import { queryKey } from "./maths.js";
import { axes, choice, html, line, shown, slider, stage, svg } from "./kit.js";

const TURNS = Array.from({ length: 361 }, (_, i) => i / 2 - 90);

export function render({ el }) {
  const state = { degrees: 0, bits: "2", source: "given" };
  const set = (key) => (value) => ((state[key] = value), view.redraw());
  const controls = [
    slider("turn of Wq", { min: -90, max: 90, step: 0.5, value: state.degrees, format: (v) => `${shown(v, 1)}°`, change: set("degrees") }),
    choice("Bits", { options: { 2: "2", 3: "3", 4: "4" }, value: state.bits, change: set("bits") }),
    choice("S", { options: { given: "given", loss: "of a squared loss" }, value: state.source, change: set("source") }),
  ];

  function draw(width) {
    const at = (degrees) => queryKey(degrees, Number(state.bits), state.source === "loss");
    const now = at(state.degrees), curve = TURNS.map((degrees) => ({ degrees, ...at(degrees) }));
    const side = width < 560 ? width : width - 216;
    const pictures = html("div", { style: "display: flex; flex-wrap: wrap; gap: 0 16px; justify-content: center" }, errors(curve, state.degrees, now, side), plane(now));
    const sentence = `With Wq and Wk rounded apart the gradient of Wk points ${shown(now.apartAngle, 1)}° away from the full-precision one; `
      + `with their product rounded as one matrix, ${shown(now.oneAngle, 1)}°. `
      + (state.source === "given" ? "S is the same for both here, so the second angle is zero." : "Here S comes from the rounded logits, so one rounded matrix errs too.");
    return { picture: [pictures, table(now)], sentence };
  }

  const view = stage(el, { title: "Two rounded factors, or one rounded product", controls, draw });
  return view.close;
}

/** Both angles over the turn, with the present turn marked. */
function errors(curve, degrees, now, width) {
  const top = 10 * Math.ceil((Math.max(...curve.flatMap((p) => [p.apartAngle, p.oneAngle])) + 3) / 10);
  const at = axes({ width, height: 220, xRange: [-90, 90], yRange: [0, top], xTicks: [-90, -45, 0, 45, 90], yTicks: [0, top / 2, top], tick: (v) => `${v}°`,
    xName: "turn of Wq", yName: "error of the gradient's direction", top: 40 });
  const points = (key) => curve.map((p) => [at.x(p.degrees), at.y(p[key])]);
  const mark = at.x(degrees);
  return svg("svg", { viewBox: `0 0 ${width} 220`, height: 220, style: `width: ${width}px; flex: none`, role: "img",
      "aria-label": "Angle between the gradient of the keys and the full-precision gradient, over the turn of the query matrix" },
    at.frame,
    line([[44, 26], [70, 26]], "orange", { thick: 2 }), svg("text", { x: 75, y: 30 }, "rounded apart"),
    line([[168, 26], [194, 26]], "blue", { dash: "5 3", thick: 2 }), svg("text", { x: 199, y: 30 }, "one matrix"),
    line([[mark, at.y(0)], [mark, at.y(top)]], "ink", { thick: 1 }),
    line(points("apartAngle"), "orange", { thick: 2 }), line(points("oneAngle"), "blue", { dash: "5 3", thick: 2 }),
    svg("circle", { cx: mark, cy: at.y(now.apartAngle), r: 5, fill: "var(--orange)" }),
    svg("rect", { x: mark - 4, y: at.y(now.oneAngle) - 4, width: 8, height: 8, fill: "var(--blue)" }));
}

/** The rows of Wq as arrows, latent and rounded. */
function plane({ query, rounded }) {
  const size = 200, to = (v) => 100 + v * 150;
  const arrow = ([x, y], i, style) => {
    const end = [to(x), to(-y)];
    return [line([[100, 100], end], style.color, style), style.dash
      ? svg("rect", { x: end[0] - 4, y: end[1] - 4, width: 8, height: 8, fill: "none", stroke: "var(--ink)", "stroke-width": 1.5 })
      : svg("circle", { cx: end[0], cy: end[1], r: 4, fill: "var(--green)" }),
      ...(style.dash ? [] : [svg("text", { x: to(1.3 * x), y: to(-1.3 * y) + 4, "text-anchor": "middle" }, `row ${i + 1}`)])];
  };
  return svg("svg", { viewBox: `0 0 ${size} 220`, height: 220, style: `width: ${size}px; flex: none`, role: "img", "aria-label": "The two rows of Wq as arrows: latent with a dot, rounded with a square" },
    line([[10, 100], [190, 100]], "rule", { thick: 1 }), line([[100, 10], [100, 190]], "rule", { thick: 1 }),
    ...query.flatMap((row, i) => arrow(row, i, { color: "green", thick: 2.4 })),
    ...rounded.flatMap((row, i) => arrow(row, i, { color: "ink", thick: 1.4, dash: "4 3" })),
    svg("text", { x: 100, y: 214, "text-anchor": "middle" }, "● latent row   □ rounded row"));
}

function table({ full, apart, one, apartAngle, oneAngle }) {
  const row = (name, gradient, error) => html("tr", {}, html("th", { scope: "row" }, name), ...[...gradient.flat().map((v) => shown(v)), error].map((text) => html("td", {}, text)));
  return html("table", {},
    html("thead", {}, html("tr", {}, ...["∂L/∂Wk", "1,1", "1,2", "2,1", "2,2", "error"].map((text) => html("th", { scope: "col" }, text)))),
    html("tbody", {}, row("full precision", full, ""), row("rounded apart", apart, `${shown(apartAngle, 1)}°`), row("one matrix", one, `${shown(oneAngle, 1)}°`)));
}

export default { render };
