import { expect, test } from "vitest";

import { STEPS, createDecoder, createEncoder } from "../src/codec.js";
import { oneEuro } from "../src/smooth.js";

/** Repeatable numbers in [0, 1) (a linear congruential generator). */
function random(seed) {
  let state = seed;
  return () => (state = (state * 1664525 + 1013904223) % 2 ** 32) / 2 ** 32;
}

const gauss = (next) => Math.sqrt(-2 * Math.log(1 - next())) * Math.cos(2 * Math.PI * next());

/** A face that moves, turns and talks, `noise` of its width unsteady, as [x0, y0, …] a frame. */
function* talkingFace(frames, noise, next = random(1)) {
  const shape = Array.from({ length: 68 }, (_, i) => [0.5 * Math.cos(i * 2.4), 0.5 * Math.sin(i * 2.4)]);
  for (let frame = 0; frame < frames; frame++) {
    const t = frame / 30;
    const angle = 0.2 * Math.sin(t * 1.7);
    const centre = [0.5 + 0.08 * Math.sin(t * 2.1), 0.4 + 0.04 * Math.sin(t * 3.3)];
    yield shape.flatMap(([x, y], i) => {
      const open = i > 47 ? 1 + 0.2 * Math.sin(t * 18) : 1;
      const [u, v] = [x + noise * gauss(next), y * open + noise * gauss(next)];
      return [
        centre[0] + 0.3 * (u * Math.cos(angle) - v * Math.sin(angle)),
        centre[1] + 0.3 * (u * Math.sin(angle) + v * Math.cos(angle)),
      ];
    });
  }
}

const faceOf = (points, emotion = 3) => ({ points, emotion, aspect: 0.75 });

test("points come back within half a step, however long the call", () => {
  const [encode, decode] = [createEncoder(), createDecoder()];
  let frame = 0;
  for (const points of talkingFace(1000, 0.003)) {
    const emotion = (frame++ % 8) - 1; // −1: none
    const { face } = decode(encode(faceOf(points, emotion)));
    expect(face.emotion).toBe(emotion);
    expect(face.aspect).toBeCloseTo(0.75, 2);
    const worst = Math.max(...points.map((value, i) => Math.abs(value - face.points[i])));
    expect(worst).toBeLessThanOrEqual(0.5 / STEPS + 1e-6);
  }
});

test("a calmed face takes well under the budget at 30 frames a second", () => {
  const encode = createEncoder();
  const smooth = oneEuro(1.5, 5);
  let bytes = 0;
  let frame = 0;
  for (const points of talkingFace(900, 0.005)) {
    bytes += encode(faceOf(smooth(points, frame++ / 30, 0.3))).length;
  }
  const kilobits = ((bytes / 900) * 8 * 30) / 1000;
  // A hundred bytes a message go into headers: 24 of the 60 kbit/s.
  expect(kilobits).toBeLessThan(60 - 24);
});

test("an absent face costs two bytes", () => {
  const [encode, decode] = [createEncoder(), createDecoder()];
  const [first, second] = talkingFace(2, 0);
  decode(encode(faceOf(first)));
  const gone = encode(null);
  expect(gone.length).toBe(2);
  expect(decode(gone)).toEqual({ face: null });
  expect(decode(encode(faceOf(second))).face.points[0]).toBeCloseTo(second[0], 3);
});

test("a lost frame stops the picture until the next key, and never bends it", () => {
  const [encode, decode] = [createEncoder(), createDecoder()];
  const frames = [...talkingFace(8, 0.003)].map((points) => [points, faceOf(points)]);
  const messages = frames.map(([, face], i) => encode(face, i === 5));
  expect(decode(messages[0]).face).toBeTruthy();
  expect(decode(messages[2])).toBeUndefined(); // 1 was lost
  expect(decode(messages[3])).toBeUndefined();
  expect(decode(messages[5]).face.points[7]).toBeCloseTo(frames[5][0][7], 3);
  expect(decode(messages[6]).face.points[7]).toBeCloseTo(frames[6][0][7], 3);
});

test("a listener who joins late waits two seconds at most", () => {
  const encode = createEncoder();
  const messages = [...talkingFace(200, 0.003)].map((points) => encode(faceOf(points)));
  const decode = createDecoder();
  const first = messages.slice(70).findIndex((message) => decode(message)?.face);
  expect(first).toBeGreaterThan(0);
  expect(first).toBeLessThanOrEqual(61);
});

test("wild and far-off points survive", () => {
  const [encode, decode] = [createEncoder(), createDecoder()];
  const next = random(2);
  for (let frame = 0; frame < 50; frame++) {
    const points = Array.from({ length: 136 }, () => (next() - 0.5) * 20);
    const { face } = decode(encode(faceOf(points)));
    points.forEach((value, i) => expect(Math.abs(value - face.points[i])).toBeLessThan(1 / STEPS));
  }
});

test("fifteen points work as well, and what is damaged throws nothing", () => {
  const [encode, decode] = [createEncoder(), createDecoder()];
  const points = Array.from({ length: 30 }, (_, i) => i / 30);
  const message = encode(faceOf(points));
  expect(decode(message).face.points.length).toBe(30);
  expect(decode(new Uint8Array(0))).toBeUndefined();
  expect(() => createDecoder()(message.slice(0, 9))).not.toThrow();
});
