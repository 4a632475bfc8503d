import { expect, test } from "vitest";

import { createTracker, oneEuro } from "../src/smooth.js";

const box = (x, y, side) => ({ left: x, top: y, right: x + side, bottom: y + side });
const face = (x, y, probabilities = [1, 0, 0, 0, 0, 0, 0]) => ({
  box: box(x, y, 100),
  eyes: [x + 30, y + 30, x + 70, y + 30],
  points: [x + 50, y + 50],
  probabilities,
  score: 0.9,
});

test("the filter calms noise and follows motion", () => {
  const filter = oneEuro(1, 5);
  const noisy = Array.from({ length: 90 }, (_, i) => filter([50 + (i % 2 ? 1 : -1)], i / 30, 100)[0]);
  expect(Math.abs(noisy.at(-1) - noisy.at(-2))).toBeLessThan(0.7); // of 2 that came in
  const quick = oneEuro(1, 5);
  let value;
  for (let i = 0; i < 60; i++) [value] = quick([i * 10], i / 30, 100); // three sides a second
  expect(590 - value).toBeLessThan(15);
});

test("its first answer is its first input, and a repeated time changes nothing", () => {
  const filter = oneEuro(1, 1);
  expect([...filter([3, 4], 1)]).toEqual([3, 4]);
  expect([...filter([9, 9], 1)]).toEqual([3, 4]);
});

test("faces keep their identity when they move and when their order changes", () => {
  const { update } = createTracker();
  const first = update([face(0, 0), face(300, 0)], 0).map(({ id }) => id);
  const second = update([face(310, 5), face(12, 5)], 1 / 30);
  expect(second.find(({ box }) => box.left > 200).id).toBe(first[1]);
  expect(second.find(({ box }) => box.left < 200).id).toBe(first[0]);
});

test("a face is kept for a moment, then forgotten", () => {
  const { update } = createTracker();
  update([face(0, 0)], 0);
  expect(update([], 0.2)).toHaveLength(1);
  expect(update([], 1)).toHaveLength(0);
});

test("the emotion changes after a clear lead, not at every tremble", () => {
  const { update } = createTracker();
  const even = (i) => [0.5 + 0.03 * (-1) ** i, 0.5 - 0.03 * (-1) ** i, 0, 0, 0, 0, 0];
  const seen = Array.from({ length: 60 }, (_, i) => update([face(0, 0, even(i))], i / 30)[0].label);
  expect(new Set(seen).size).toBe(1);
  for (let i = 60; i < 80; i++) update([face(0, 0, [0, 1, 0, 0, 0, 0, 0])], i / 30);
  const [track] = update([face(0, 0, [0, 1, 0, 0, 0, 0, 0])], 81 / 30);
  expect(track.label).toBe(1);
  expect(track.since).toBeGreaterThan(59 / 30);
});
