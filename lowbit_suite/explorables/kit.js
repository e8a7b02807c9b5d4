// What the explorables share: their look in light and dark, labelled controls, and axes in SVG.

/** Colors by theme. Text colors (ink, quiet) reach 4.5:1 on the ground, marks 3:1; a test computes it. */
export const THEMES = {
  light: { ground: "#ffffff", ink: "#1b1f24", quiet: "#57606a", rule: "#868f99", blue: "#0969a8", orange: "#b35c00", green: "#0b7a5a" },
  dark: { ground: "#15181c", ink: "#e6edf3", quiet: "#a5aeb8", rule: "#79828d", blue: "#5cb3f2", orange: "#f0a33e", green: "#3ccf9f" },
};

const variables = (theme) => Object.entries(THEMES[theme]).map(([name, color]) => `--${name}: ${color};`).join(" ");
// How JupyterLab, VS Code, Colab and Sphinx themes mark the page as light or dark; a mark wins over the system's setting.
const marked = (theme) =>
  `:is([data-theme="${theme}"], [data-jp-theme-light="${theme === "light"}"], .vscode-${theme}, html[theme="${theme}"])`;

const STYLE = `
.lowbit-explorable { ${variables("light")} color-scheme: light; }
@media (prefers-color-scheme: dark) { .lowbit-explorable:not(${marked("light")} *) { ${variables("dark")} color-scheme: dark; } }
${marked("dark")} .lowbit-explorable { ${variables("dark")} color-scheme: dark; }
.lowbit-explorable { box-sizing: border-box; max-width: 760px; padding: 12px 14px; border: 1px solid var(--rule); border-radius: 6px;
  background: var(--ground); color: var(--ink); font: 14px/1.45 system-ui, sans-serif; }
.lowbit-explorable * { box-sizing: border-box; }
.lowbit-explorable h3 { margin: 0 0 8px; padding: 0; border: 0; font: bold 16px/1.3 system-ui, sans-serif; color: var(--ink); }
.lowbit-explorable p { margin: 8px 0 0; color: var(--ink); }
.lowbit-explorable .controls { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); gap: 4px 20px; }
.lowbit-explorable label.slider { display: grid; grid-template-columns: 8.5em 1fr 4.2em; align-items: center; gap: 8px; min-height: 30px; }
.lowbit-explorable input[type="range"] { width: 100%; margin: 0; accent-color: var(--blue); }
.lowbit-explorable .value { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.lowbit-explorable fieldset { margin: 0; padding: 0; border: 0; min-width: 0; min-height: 30px; display: flex; flex-wrap: wrap; align-items: center; gap: 2px 12px; }
.lowbit-explorable legend { float: left; width: auto; margin: 0 4px 0 0; padding: 0; font: inherit; }
.lowbit-explorable fieldset label { white-space: nowrap; }
.lowbit-explorable input[type="radio"] { accent-color: var(--blue); margin: 0 4px 0 0; vertical-align: -1px; }
.lowbit-explorable input:focus-visible { outline: 2px solid var(--blue); outline-offset: 2px; }
.lowbit-explorable svg { display: block; width: 100%; margin-top: 8px; overflow: visible; }
.lowbit-explorable svg text { fill: var(--ink); font-size: 12px; }
.lowbit-explorable svg text.quiet { fill: var(--quiet); }
.lowbit-explorable table { border-collapse: collapse; width: 100%; margin-top: 8px; font-variant-numeric: tabular-nums; color: var(--ink); }
.lowbit-explorable th, .lowbit-explorable td { padding: 2px 6px; border: 0; border-bottom: 1px solid var(--rule); text-align: right; white-space: nowrap; font-weight: normal; background: none; color: inherit; }
.lowbit-explorable tr > :first-child { text-align: left; white-space: normal; }
.lowbit-explorable thead th { color: var(--quiet); }
`;

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

/** An HTML element; attributes that begin with "on" are listeners. */
export const html = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);

/** An SVG element. */
export const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

/** A number as it is shown: a true minus, no minus zero. */
export function shown(x, digits = 2) {
  const text = x.toFixed(digits);
  return (Number(text) === 0 ? text.replace("-", "") : text).replace("-", "−");
}

/** A labelled slider. `change(value)` is called as it moves; `format` writes the value beside it, and for screen readers. */
export function slider(label, { min, max, step, value, format = shown, change }) {
  const text = html("span", { class: "value", "aria-hidden": "true" });
  const input = html("input", { type: "range", min, max, step, value, oninput: () => (write(), change(Number(input.value))) });
  const write = () => {
    text.textContent = format(Number(input.value));
    input.setAttribute("aria-valuetext", text.textContent);
  };
  write();
  return html("label", { class: "slider" }, html("span", {}, label), input, text);
}

let groups = 0;

/** Radio buttons. `options` maps values to labels. */
export function choice(legend, { options, value, change }) {
  const name = `lowbit-choice-${groups++}-${Math.random().toString(36).slice(2)}`;
  const button = (key, label) => {
    const input = html("input", { type: "radio", name, value: key, onchange: () => change(key) });
    input.checked = key === value;
    return html("label", {}, input, label);
  };
  return html("fieldset", {}, html("legend", {}, legend), ...Object.entries(options).map(([key, label]) => button(key, label)));
}

/**
 * Put an explorable into `el`: title, controls, a picture and a sentence that says what the picture shows.
 * `draw(width)` returns `{picture, sentence}`; it is called again by `redraw()` and when the width changes.
 */
export function stage(el, { title, controls, draw }) {
  const picture = html("div");
  const sentence = html("p", { role: "status", "aria-live": "polite" });
  const panel = html("div", { class: "controls" });
  const root = html("section", { class: "lowbit-explorable", "aria-label": title }, html("style", {}, STYLE), html("h3", {}, title), panel, picture, sentence);
  let width = 0;
  const redraw = () => {
    const now = draw(width);
    picture.replaceChildren(...now.picture);
    if (sentence.textContent !== now.sentence) sentence.textContent = now.sentence;
  };
  const setControls = (list) => panel.replaceChildren(...list);
  setControls(controls);
  el.append(root);
  const measure = () => {
    const next = Math.max(260, Math.floor(picture.clientWidth || 640));
    if (next !== width) {
      width = next;
      redraw();
    }
  };
  const observer = new ResizeObserver(measure);
  observer.observe(picture);
  measure();
  return { redraw, setControls, close: () => observer.disconnect() };
}

/** Axes of a plot: `x(v)` and `y(v)` give pixels, `frame` holds rules, tick labels and the axes' names. */
export function axes({ width, height, xRange, yRange, xTicks, yTicks = [], xName, yName, left = 44, bottom = 36, top = 18, tick = String }) {
  const x = (v) => left + ((v - xRange[0]) / (xRange[1] - xRange[0])) * (width - left - 8);
  const y = (v) => height - bottom - ((v - yRange[0]) / (yRange[1] - yRange[0])) * (height - bottom - top);
  const frame = svg("g", {},
    svg("line", { x1: left, x2: width - 8, y1: height - bottom, y2: height - bottom, stroke: "var(--rule)" }),
    ...xTicks.map((v) => svg("text", { x: x(v), y: height - bottom + 15, "text-anchor": "middle", class: "quiet" }, tick(v).replace("-", "−"))),
    ...yTicks.map((v) => svg("text", { x: left - 6, y: y(v) + 4, "text-anchor": "end", class: "quiet" }, tick(v).replace("-", "−"))),
    svg("text", { x: (left + width - 8) / 2, y: height - 4, "text-anchor": "middle" }, xName),
    ...(yName ? [svg("text", { x: 0, y: 11 }, yName)] : []));
  return { x, y, frame };
}

/** A polyline through `[x, y]` pixels; `dash` is SVG's stroke-dasharray. */
export const line = (points, color, { dash, thick = 1.6 } = {}) =>
  svg("polyline", { points: points.map((p) => p.map((v) => v.toFixed(1)).join(",")).join(" "), fill: "none", stroke: `var(--${color})`, "stroke-width": thick, "stroke-dasharray": dash });
