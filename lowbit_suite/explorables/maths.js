// The maths of the explorables: pure functions of numbers, no DOM. The tests compare each with lowbit.functional.

/** The nearest integer; ties go to the even one, as in torch.round. */
export function roundEven(x) {
  return Math.abs(x % 1) === 0.5 ? 2 * Math.round(x / 2) : Math.round(x);
}

const clamp = (x, low, high) => Math.min(Math.max(x, low), high);

/**
 * A DenseShift weight, its counts S_0 ... S_N and the gradient of each latent (lowbit.functional.denseshift).
 * `gradient` is G, the loss gradient that arrives at the weight; `surrogate` is "sqrt" or "identity".
 */
export function denseshift(sign, gates, gradient = 1, surrogate = "sqrt") {
  const counts = [0];
  for (const t of gates) counts.push(t > 0 ? counts.at(-1) + 1 : 0);
  const exponent = counts.at(-1);
  const sgn = sign >= 0 ? 1 : -1;
  const size = surrogate === "sqrt" ? Math.sqrt(exponent + 1) : 2 ** exponent;
  const slope = surrogate === "sqrt" ? 0.5 / size : size * Math.LN2;
  const gateGradients = [];
  let arriving = gradient * sgn * slope;
  for (let k = gates.length; k > 0; k--) {
    gateGradients.unshift(arriving * (counts[k - 1] + 1));
    if (gates[k - 1] <= 0) arriving = 0;
  }
  return { counts, exponent, weight: sgn * 2 ** exponent, signGradient: gradient * size, gateGradients };
}

/** Optima of the fifteen weights that share a row, and so a scale, with the weight that is shown. */
export const ROW = [-3.4, -2.7, -2.2, -1.6, -1.3, -0.8, -0.4, 0.4, 0.6, 0.9, 1.3, 1.7, 2.2, 2.6, 2.9];
const LOW = -4, HIGH = 3; // the codes of a signed 3-bit grid

const code = (w, scale) => clamp(roundEven(w / scale), LOW, HIGH);

/**
 * Train a row of LSQ weights by gradient descent on ½ Σ (q(w) - t)², each weight starting at its optimum t.
 * The first weight has the optimum `optimum`, the others those of ROW. With `learned` the scale, 1 at the start, gets
 * LSQ's gradient, times 1/sqrt(weights · largest code). Returns, for each step, the first weight's latent, its code
 * and the scale.
 */
export function train(optimum, rate, learned, steps) {
  const optima = [optimum, ...ROW];
  const weights = [...optima];
  const gradScale = 1 / Math.sqrt(weights.length * HIGH);
  let scale = 1;
  const latents = [], codes = [], scales = [];
  for (let step = 0; step < steps; step++) {
    latents.push(weights[0]);
    codes.push(code(weights[0], scale));
    scales.push(scale);
    let scaleGradient = 0;
    for (let i = 0; i < weights.length; i++) {
      const k = code(weights[i], scale);
      const error = k * scale - optima[i];
      const inside = weights[i] > LOW * scale && weights[i] < HIGH * scale;
      scaleGradient += error * (k - (inside ? weights[i] / scale : 0));
      if (inside) weights[i] -= rate * error;
    }
    if (learned) scale -= rate * gradScale * scaleGradient;
  }
  return { latents, codes, scales };
}

/** Which steps turn back: 1 where the code changes against the direction of its previous change, else 0. */
export function reversals(codes) {
  let last = 0;
  return codes.map((k, t) => {
    const change = t ? Math.sign(k - codes[t - 1]) : 0;
    const turned = change * last === -1 ? 1 : 0;
    if (change) last = change;
    return turned;
  });
}

/** Changes of code, and how many of them the scale alone brought about: the new latent keeps its code on the old scale. */
export function causes({ latents, codes, scales }) {
  let changes = 0, byScale = 0;
  for (let t = 1; t < codes.length; t++) {
    if (codes[t] === codes[t - 1]) continue;
    changes++;
    if (code(latents[t], scales[t - 1]) === codes[t - 1]) byScale++;
  }
  return { changes, byScale };
}

/** Reversals a step of a weight on a fixed grid: 2·min(d, 1-d), d the optimum's place between two levels. */
export function expectedFrequency(optimum, scale = 1) {
  const x = optimum / scale, d = x - Math.floor(x);
  return x <= LOW || x >= HIGH ? 0 : 2 * Math.min(d, 1 - d);
}

/** StatsQ, row by row: the scale is 2·mean|w|, the levels are odd multiples of scale / 2^bits. */
export function statsq(rows, bits) {
  const n = 2 ** (bits - 1);
  return rows.map((row) => {
    const scale = (2 * row.reduce((sum, w) => sum + Math.abs(w), 0)) / row.length;
    return row.map((w) => (scale * (roundEven(clamp(w / scale, -1, 1 - 1e-6) * n - 0.5) + 0.5)) / n);
  });
}

export const transpose = (a) => a[0].map((_, j) => a.map((row) => row[j]));
export const product = (a, b) => a.map((row) => b[0].map((_, j) => row.reduce((sum, x, k) => sum + x * b[k][j], 0)));
const minus = (a, b) => a.map((row, i) => row.map((x, j) => x - b[i][j]));

/** Turn each row of a two-column matrix counterclockwise. */
export function turn(rows, degrees) {
  const c = Math.cos((degrees * Math.PI) / 180), s = Math.sin((degrees * Math.PI) / 180);
  return rows.map(([x, y]) => [c * x - s * y, s * x + c * y]);
}

/** The angle between two matrices taken as vectors, in degrees. */
export function angle(a, b) {
  const u = a.flat(), v = b.flat();
  const dot = (p, q) => p.reduce((sum, x, i) => sum + x * q[i], 0);
  return (Math.acos(clamp(dot(u, v) / Math.sqrt(dot(u, u) * dot(v, v)), -1, 1)) * 180) / Math.PI;
}

export const QUERY = [[0.39, 0.01], [-0.25, 0.15]];
export const KEY = [[0.3, -0.12], [0.16, 0.34]];
export const GIVEN = [[1, -1], [2, 3]];
export const TARGET = [[-0.2, 0.3], [0.1, -0.25]];

/**
 * The gradient of W_k three ways, with W_q turned by `degrees`: full precision, W_q and W_k rounded apart, and their
 * product rounded as one matrix. S, the gradient at the logits, is GIVEN, or logits - TARGET with `loss`: the gradient
 * of ½‖logits - TARGET‖² for two tokens (1, 0) and (0, 1).
 */
export function queryKey(degrees, bits, loss) {
  const query = turn(QUERY, degrees);
  const rounded = statsq(query, bits), roundedKey = statsq(KEY, bits);
  const S = (logits) => (loss ? minus(logits, TARGET) : GIVEN);
  const full = product(query, S(product(transpose(query), KEY)));
  const apart = product(rounded, S(product(transpose(rounded), roundedKey)));
  const one = product(query, S(statsq(product(transpose(query), KEY), bits)));
  return { query, rounded, full, apart, one, apartAngle: angle(apart, full), oneAngle: angle(one, full) };
}

/**
 * How many weights annealing lets move, and how many of these reach a threshold. `within` holds, for 0, 1, ... 500
 * thousandths, how many weights lie at most so far from a threshold; `boundary` and `reach` are such distances.
 */
export function annealing(within, boundary, reach) {
  const at = (distance) => within[clamp(Math.round(1000 * distance), 0, within.length - 1)];
  return { mayMove: at(boundary), mayFlip: at(Math.min(boundary, reach)), unmasked: at(reach) };
}
