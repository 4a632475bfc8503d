import { expect, test } from "vitest";

import { findFaces, merge, squares } from "../src/detector.js";

const find = (left, top, side, score) => ({
  score,
  box: { left, top, right: left + side, bottom: top + side },
  eyes: [left, top, left + side, top],
});

/** A network that sees one face at anchor 100 of each square it is given. */
async function network() {
  const boxes = new Float32Array(896 * 16);
  const logits = new Float32Array(896).fill(-20);
  boxes.set([2, -3, 40, 40, -10, -10, 10, -10], 100 * 16);
  logits[100] = 3;
  return { boxes, logits };
}

test("a find is read off its anchor and scaled to the picture", async () => {
  const rgb = { data: new Uint8Array(256 * 256 * 3), width: 256, height: 256, channels: 3 };
  const [face, ...others] = await findFaces(rgb, network);
  expect(others).toHaveLength(0);
  // Anchor 100: two a cell of 8 pixels, 16 cells a row: row 3, column 2, so (20, 28).
  const x = (face.eyes[0] + face.eyes[2]) / 2;
  expect(x).toBeCloseTo(-0.5 + 2 * 20);
  expect(face.eyes[3]).toBeCloseTo(-0.5 + 2 * (28 - 10));
  expect((face.box.left + face.box.right) / 2).toBeCloseTo(-0.5 + 2 * 22);
  expect(face.score).toBeCloseTo(1 / (1 + Math.exp(-3)));
});

test("what further looks at a still see must be surer", async () => {
  const rgb = { data: new Uint8Array(600 * 600 * 3), width: 600, height: 600, channels: 3 };
  const looks = squares(600, 600, true).length;
  const unsure = (sure) => {
    let look = 0;
    return async () => {
      const found = await network();
      found.logits[100] = Math.log(sure / (1 - sure)); // in all but the first look
      if (look++ === 0) found.logits.fill(-20);
      return found;
    };
  };
  expect(looks).toBeGreaterThan(10);
  expect(await findFaces(rgb, unsure(0.6), true)).toHaveLength(0);
  expect((await findFaces(rgb, unsure(0.7), true)).length).toBeGreaterThan(3);
});

test("overlapping finds become one, weighted by score; distant ones stay", () => {
  const faces = merge([find(0, 0, 100, 0.9), find(10, 0, 100, 0.6), find(300, 0, 100, 0.7)]);
  expect(faces).toHaveLength(2);
  expect(faces[0].box.left).toBeCloseTo((10 * 0.6) / 1.5);
  expect(faces[0].score).toBe(0.9);
});

test("a piece of a face that lies within it is no other face", () => {
  expect(merge([find(0, 0, 100, 0.9), find(5, 5, 30, 0.6)])).toHaveLength(1);
});

test("a video is looked at once a frame; a large picture in parts that cover it", () => {
  expect(squares(640, 480, false)).toHaveLength(1);
  expect(squares(1, 1, true)).toHaveLength(2);
  const parts = squares(1600, 900, true).slice(2);
  expect(parts.length).toBeGreaterThan(6);
  for (const [x, y] of [[0, 0], [1599, 899], [800, 450], [533, 0]]) {
    expect(parts.some((p) => p.left <= x && x <= p.right && p.top <= y && y <= p.bottom)).toBe(true);
  }
});
