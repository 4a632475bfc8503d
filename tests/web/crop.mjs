// Crops for test_crop.py: reads {path, width, height, channels, jobs: [[left, top, right, bottom,
// size]…]}, writes the crops as bytes, one after the other.

import { readFileSync } from "node:fs";

import { crop, fromRgba } from "../../web/src/crop.js";

const { path, width, height, channels, jobs } = JSON.parse(readFileSync(0, "utf8"));
const image = fromRgba(readFileSync(path), width, height, channels);
for (const [left, top, right, bottom, size] of jobs) {
  process.stdout.write(Uint8Array.from(crop(image, { left, top, right, bottom }, size)));
}
