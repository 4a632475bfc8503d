// A face in some forty bytes: its points, quantised and coded as differences.
//
// A message is
//   byte 0   bit 7: key; bit 6: there is a face; bits 3–5: Rice parameter; bits 0–2: emotion, 7: none
//   byte 1   sequence number, modulo 256
//   key with a face: byte 2, height / width of the picture in 64ths; byte 3, number of points
//   bits     the points in steps of 1/2048 of the picture's width
// A key codes each point as its difference from the point before it; any other frame codes the
// mean motion since the frame before, then what each point did beyond it. Both are small numbers,
// so they get Rice codes (Rice and Plaunt 1971) with the parameter that suits the frame best. The
// encoder predicts from what the decoder has, so rounding never adds up.

export const STEPS = 2048;
const KEY_EVERY = 60; // frames: what a listener who joins late waits for at most
const ESCAPE = 24; // a quotient of so much is followed by the plain number instead
const PLAIN_BITS = 18;
const NO_EMOTION = 7;

/**
 * @returns {(face: {points: ArrayLike<number>, emotion: number, aspect: number} | null,
 *   key?: boolean) => Uint8Array} encodes a frame: points [x0, y0, …] in picture widths, emotion
 *   0–6 or −1 for none, aspect = height / width. `key` asks for a frame that needs none before it.
 */
export function createEncoder() {
  let known = null;
  let sinceKey = 0;
  let sequence = 0;

  return function encode(face, key = false) {
    const number = sequence++ & 255;
    if (!face) {
      known = null;
      return Uint8Array.of(128, number);
    }
    const values = Int32Array.from(face.points, (value) => Math.round(value * STEPS));
    const isKey = key || known?.length !== values.length || sinceKey >= KEY_EVERY;
    sinceKey = isKey ? 0 : sinceKey + 1;
    const motion = isKey ? [] : meanMotion(known, values);
    const numbers = [...motion, ...values.map((value, i) => value - predict(known, values, motion, i))];
    const k = bestParameter(numbers);
    const emotion = face.emotion < 0 ? NO_EMOTION : face.emotion;
    const head = [(isKey ? 128 : 0) | 64 | (k << 3) | emotion, number];
    if (isKey) head.push(clampByte(face.aspect * 64), values.length / 2);
    known = values;
    return pack(head, numbers, k);
  };
}

/**
 * @returns {(bytes: Uint8Array) => {face: object | null} | undefined} decodes a
 *   frame into what was encoded; undefined where a frame before it is missing, until the next key.
 */
export function createDecoder() {
  let known = null;
  let aspect = 0.75;
  let expected = -1;

  return function decode(bytes) {
    if (bytes.length < 2) return undefined;
    const isKey = (bytes[0] & 128) !== 0;
    const follows = bytes[1] === expected;
    expected = (bytes[1] + 1) & 255;
    if (!(bytes[0] & 64)) {
      known = null;
      return { face: null };
    }
    if (!isKey && !(follows && known)) {
      known = null;
      return undefined;
    }
    if (isKey) aspect = bytes[2] / 64;
    const length = isKey ? bytes[3] * 2 : known.length;
    const read = unpack(bytes, isKey ? 4 : 2, (bytes[0] >> 3) & 7);
    const motion = isKey ? [] : [read(), read()];
    const values = new Int32Array(length);
    for (let i = 0; i < length; i++) values[i] = predict(known, values, motion, i) + read();
    known = values;
    const points = Float32Array.from(values, (value) => value / STEPS);
    const emotion = bytes[0] & 7;
    return { face: { points, emotion: emotion === NO_EMOTION ? -1 : emotion, aspect } };
  };
}

/** From the frame before and the mean motion; in a key, where there is none, from the last point. */
function predict(known, values, motion, i) {
  if (motion.length) return known[i] + motion[i % 2];
  return i < 2 ? STEPS / 2 : values[i - 2];
}

function meanMotion(before, after) {
  const sum = [0, 0];
  for (let i = 0; i < after.length; i++) sum[i % 2] += after[i] - before[i];
  return sum.map((value) => Math.round(value / (after.length / 2)));
}

/** Signed to unsigned, small ones small: 0, −1, 1, −2, 2 … to 0, 1, 2, 3, 4 … */
const fold = (value) => (value < 0 ? -2 * value - 1 : 2 * value);
const unfold = (value) => (value % 2 ? -(value + 1) / 2 : value / 2);

function codeLength(value, k) {
  const quotient = fold(value) >> k;
  return quotient < ESCAPE ? quotient + 1 + k : ESCAPE + PLAIN_BITS;
}

function bestParameter(numbers) {
  const cost = (k) => numbers.reduce((sum, value) => sum + codeLength(value, k), 0);
  const costs = Array.from({ length: 8 }, (_, k) => cost(k));
  return costs.indexOf(Math.min(...costs));
}

function clampByte(value) {
  return Math.min(255, Math.max(1, Math.round(value)));
}

function pack(head, numbers, k) {
  const bits = numbers.reduce((sum, value) => sum + codeLength(value, k), 0);
  const bytes = new Uint8Array(head.length + Math.ceil(bits / 8));
  bytes.set(head);
  let at = head.length * 8;
  const put = (value, count) => {
    for (let i = count - 1; i >= 0; i--, at++) bytes[at >> 3] |= ((value >> i) & 1) << (7 - (at & 7));
  };
  for (const value of numbers) {
    const folded = fold(value);
    const quotient = folded >> k;
    for (let i = 0; i < Math.min(quotient, ESCAPE); i++) put(1, 1);
    if (quotient < ESCAPE) {
      put(0, 1);
      put(folded, k);
    } else {
      put(folded, PLAIN_BITS);
    }
  }
  return bytes;
}

function unpack(bytes, start, k) {
  let at = start * 8;
  const bit = () => {
    const value = (bytes[at >> 3] >> (7 - (at & 7))) & 1; // beyond the end: 0
    at++;
    return value;
  };
  const get = (count) => {
    let value = 0;
    for (let i = 0; i < count; i++) value = value * 2 + bit();
    return value;
  };
  return () => {
    let quotient = 0;
    while (quotient < ESCAPE && bit()) quotient++;
    return unfold(quotient < ESCAPE ? (quotient << k) | get(k) : get(PLAIN_BITS));
  };
}
