import { expect, test } from "vitest";

import { jpegHasEnd, pngHasEnd } from "../src/source.js";

const END = [0xff, 0xd9];
const thumbnail = [0xff, 0xe1, 0, 6, 0xff, 0xd8, ...END]; // metadata with a small picture in it
const table = [0xff, 0xc4, 0, 4, ...END]; // between two scans, its bytes by chance those of an end
const scan = [0xff, 0xda, 0, 3, 1, 7, 0xff, 0, 0xd9, 8, 0xff, 0xd3, 9]; // with a 255 and a restart
const film = [5, ...END, 6];
const bytes = (...parts) => Uint8Array.from(parts.flat());

test("a JPEG ends where its segments end", () => {
  const whole = bytes([0xff, 0xd8], thumbnail, scan, table, scan, END);
  expect(jpegHasEnd(whole)).toBe(true);
  for (let length = 0; length < whole.length; length++) {
    expect(jpegHasEnd(whole.subarray(0, length))).toBe(false);
  }
  expect(jpegHasEnd(bytes([...whole], film))).toBe(true);
  expect(jpegHasEnd(bytes([...whole], Array(100_000).fill(1)))).toBe(true);
});

test("a PNG ends with the chunk that says so", () => {
  const chunk = (name, data) => [0, 0, 0, data.length, ...[...name].map((c) => c.charCodeAt(0)), ...data, 1, 2, 3, 4];
  const text = chunk("tEXt", [..."IEND"].map((c) => c.charCodeAt(0)));
  const whole = bytes(Array(8).fill(9), text, chunk("IDAT", [1, 2, 3]), chunk("IEND", []));
  expect(pngHasEnd(whole)).toBe(true);
  for (let length = 0; length < whole.length; length++) {
    expect(pngHasEnd(whole.subarray(0, length))).toBe(false);
  }
  expect(pngHasEnd(bytes([...whole], film))).toBe(true);
});
