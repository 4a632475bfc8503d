// BlazeFace, MediaPipe's short-range face detector (Bazarevsky et al. 2019, "BlazeFace:
// Sub-millisecond Neural Face Detection on Mobile GPUs"), around any runtime that runs its network.
// `pipelines/detectors.py` does the same in Python.

import { crop } from "./crop.js";

export const SIDE = 128;
const SURE = 0.5; // probability from which a find counts, as in MediaPipe
const SURE_AGAIN = 0.65; // of what only further looks at a still see; measured in `pipelines/detectors.py`
const OVERLAP = 0.3; // finds that overlap by more (intersection over union) are one face
const BORDER = 0.25; // around a picture: a face that fills it is seen only with a border

// The models are trained on the square around the 68 points. Measured on YouTube Faces' training
// frames (`BOXES` in `pipelines/detectors.py`): its side and its shift down, in sides of the detector's box.
export const SIDE_RATIO = 0.99;
export const DOWN = 0.06;

const ANCHORS = anchors();

/**
 * Find faces.
 *
 * @param {{data: Uint8Array, width: number, height: number, channels: 3}} rgb
 * @param {(input: Float32Array) => Promise<{boxes: Float32Array, logits: Float32Array}>} network
 * @param {boolean} thorough for a still picture: look at parts too, for small faces.
 * @returns {Promise<{box: object, score: number, eyes: number[]}[]>} surest first; the square
 *   around a face's points, the probability, and both eyes [x, y, x, y], in pixels.
 */
export async function findFaces(rgb, network, thorough = false) {
  const finds = [];
  for (const [look, square] of squares(rgb.width, rgb.height, thorough).entries()) {
    const pixels = crop(rgb, square, SIDE);
    for (let i = 0; i < pixels.length; i++) pixels[i] = pixels[i] / 127.5 - 1;
    finds.push(...decode(await network(pixels), square, look ? SURE_AGAIN : SURE));
  }
  const inside = ({ box }) => {
    const x = (box.left + box.right) / 2;
    const y = (box.top + box.bottom) / 2;
    return area(box) > 0 && x > -0.5 && y > -0.5 && x < rgb.width - 0.5 && y < rgb.height - 0.5;
  };
  return merge(finds.filter(inside)).map(toPoints);
}

/** Where to look: the whole picture; thoroughly, with a border and in overlapping parts too. */
export function squares(width, height, thorough) {
  const side = Math.max(width, height);
  const centred = (x, y, edge) => ({
    left: x - edge / 2,
    top: y - edge / 2,
    right: x + edge / 2,
    bottom: y + edge / 2,
  });
  const all = [centred((width - 1) / 2, (height - 1) / 2, side)];
  if (!thorough) return all;
  all.push(centred((width - 1) / 2, (height - 1) / 2, side * (1 + 2 * BORDER)));
  for (const edge of [side / 2, side / 3]) {
    if (edge < SIDE) continue; // nothing to gain: such a part would be enlarged
    for (const y of steps(height, edge)) for (const x of steps(width, edge)) all.push(centred(x, y, edge));
  }
  return all;
}

/** Centres of parts of length `edge` that overlap by at least a third and cover `length`. */
function steps(length, edge) {
  if (edge >= length) return [(length - 1) / 2];
  const count = Math.ceil((length - edge) / (edge * (2 / 3))) + 1;
  return Array.from({ length: count }, (_, i) => edge / 2 - 0.5 + (i * (length - edge)) / (count - 1));
}

/** Centres of the 896 anchors, in pixels of the input: two a cell of 8 pixels, six one of 16. */
function anchors() {
  const centres = [];
  for (const [stride, each] of [[8, 2], [16, 6]]) {
    for (let y = stride / 2; y < SIDE; y += stride) {
      for (let x = stride / 2; x < SIDE; x += stride) {
        for (let i = 0; i < each; i++) centres.push([x, y]);
      }
    }
  }
  return centres;
}

function decode({ boxes, logits }, square, sure) {
  const scale = (square.right - square.left) / SIDE;
  const stride = boxes.length / ANCHORS.length;
  const finds = [];
  ANCHORS.forEach(([anchorX, anchorY], i) => {
    const score = 1 / (1 + Math.exp(-logits[i]));
    if (score < sure) return;
    const at = i * stride;
    const x = (j) => square.left + (anchorX + boxes[at + j]) * scale;
    const y = (j) => square.top + (anchorY + boxes[at + j]) * scale;
    const width = boxes[at + 2] * scale;
    const height = boxes[at + 3] * scale;
    finds.push({
      score,
      box: {
        left: x(0) - width / 2,
        top: y(1) - height / 2,
        right: x(0) + width / 2,
        bottom: y(1) + height / 2,
      },
      eyes: [x(4), y(5), x(6), y(7)],
    });
  });
  return finds;
}

/** One find a face: the average of those that overlap the surest, weighted by their scores. */
export function merge(finds) {
  const rest = [...finds].sort((a, b) => b.score - a.score);
  const faces = [];
  while (rest.length) {
    const best = rest[0];
    const same = rest.filter((find) => overlap(best.box, find.box) > OVERLAP);
    const total = same.reduce((sum, find) => sum + find.score, 0);
    const mean = (read) => same.reduce((sum, find) => sum + read(find) * find.score, 0) / total;
    faces.push({
      score: best.score,
      box: {
        left: mean((find) => find.box.left),
        top: mean((find) => find.box.top),
        right: mean((find) => find.box.right),
        bottom: mean((find) => find.box.bottom),
      },
      eyes: best.eyes.map((_, i) => mean((find) => find.eyes[i])),
    });
    // What a part cut off at its edge is the same face too, though it overlaps little.
    const merged = faces.at(-1).box;
    for (let i = rest.length - 1; i >= 0; i--) {
      if (same.includes(rest[i]) || covered(rest[i].box, merged) > 0.6) rest.splice(i, 1);
    }
  }
  return faces;
}

function area(box) {
  return Math.max(0, box.right - box.left) * Math.max(0, box.bottom - box.top);
}

function intersection(a, b) {
  return area({
    left: Math.max(a.left, b.left),
    top: Math.max(a.top, b.top),
    right: Math.min(a.right, b.right),
    bottom: Math.min(a.bottom, b.bottom),
  });
}

/** Intersection over union, 0–1. */
export function overlap(a, b) {
  const both = intersection(a, b);
  return both / (area(a) + area(b) - both || 1);
}

function covered(a, b) {
  return intersection(a, b) / (area(a) || 1);
}

function toPoints({ box, score, eyes }) {
  const edge = Math.max(box.right - box.left, box.bottom - box.top);
  const half = (edge * SIDE_RATIO) / 2;
  const x = (box.left + box.right) / 2;
  const y = (box.top + box.bottom) / 2 + DOWN * edge;
  return { score, eyes, box: { left: x - half, top: y - half, right: x + half, bottom: y + half } };
}
