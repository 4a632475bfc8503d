// Crops for test_crop.py and test_photo.py: reads {path, width, height, channels, jobs: [[left, top,
// right, bottom, size, placing?]…]}, writes the crops as bytes, one after the other.

import { readFileSync } from "node:fs";

import { crop, framed, fromRgba } from "../../web/src/crop.js";

const { path, width, height, channels, jobs } = JSON.parse(readFileSync(0, "utf8"));
const image = fromRgba(readFileSync(path), width, height, channels);
for (const [left, top, right, bottom, size, placing] of jobs) {
  const box = { left, top, right, bottom };
  process.stdout.write(Uint8Array.from(crop(image, placing ? framed(box, placing) : box, size)));
}
