// node --test tests/suite/explorables/maths.test.mjs: the maths of the explorables against values from lowbit.functional.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

const read = (path) => readFileSync(new URL(path, import.meta.url), "utf8");
const load = (name) => import(`data:text/javascript,${encodeURIComponent(read(`../../../lowbit_suite/explorables/${name}.js`))}`);
const maths = await load("maths");
const golden = JSON.parse(read("golden.json"));

/** Fails unless every number of `expected` is in `found`, to a relative 1e-12 or an absolute 1e-12. */
function near(found, expected, where) {
  if (typeof expected === "number") {
    assert.equal(typeof found, "number", where);
    const allowed = where.endsWith("Angle") ? 1e-5 : 1e-12 * Math.max(1, Math.abs(expected)); // acos is steep at 1
    assert.ok(Math.abs(found - expected) <= allowed, `${where}: ${found} instead of ${expected}`);
    return;
  }
  if (Array.isArray(expected)) assert.equal(found.length, expected.length, where);
  for (const key of Object.keys(expected)) near(found[key], expected[key], `${where}.${key}`);
}

for (const [name, cases] of Object.entries(golden))
  test(`${name} agrees with lowbit.functional`, () => {
    assert.ok(cases.length > 5);
    for (const { given, expected } of cases) near(maths[name](...given), expected, `${name}(${JSON.stringify(given).slice(0, 60)})`);
  });

test("ties are rounded to even", () => {
  for (const [x, y] of [[0.5, 0], [1.5, 2], [2.5, 2], [-0.5, 0], [-1.5, -2], [-2.5, -2], [0.49, 0], [-0.51, -1]])
    assert.equal(maths.roundEven(x) + 0, y);
});

test("a fixed scale gives the frequency of the formula, whatever the rate", () => {
  for (const optimum of [0.1, 0.25, 0.4, 0.5, 0.8, 1.3])
    for (const rate of [0.1, 0.01]) {
      const turned = maths.reversals(maths.train(optimum, rate, false, 3000).codes).slice(-2000);
      const measured = turned.reduce((a, b) => a + b) / 2000;
      assert.ok(Math.abs(measured - maths.expectedFrequency(optimum)) < 0.005, `${optimum}, ${rate}: ${measured}`);
    }
});

test("the scale alone changes a level only where it is learned", () => {
  assert.equal(maths.causes(maths.train(1.3, 0.1, false, 2000)).byScale, 0);
  assert.ok(maths.causes(maths.train(1.3, 0.1, true, 2000)).byScale > 0);
});

test("annealing counts the weights within the boundary range, and those that reach a threshold", async () => {
  const { LATENTS } = await load("latents");
  const { within, counts } = LATENTS;
  assert.deepEqual(maths.annealing(within, 0.005, 0.05), { mayMove: within[5], mayFlip: within[5], unmasked: within[50] });
  assert.deepEqual(maths.annealing(within, 0.1, 0.02), { mayMove: within[100], mayFlip: within[20], unmasked: within[20] });
  assert.ok(within.every((n, k) => k === 0 || n >= within[k - 1]) && within[500] < counts.reduce((a, b) => a + b));
});
