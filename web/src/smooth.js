// Faces followed from frame to frame, their points and probabilities calmed.

import { overlap } from "./detector.js";

const SAME = 0.2; // overlap from which a face is the one of the frame before
const FORGET = 0.4; // seconds without being seen
const TAKES_OVER = 0.08; // a new emotion must lead by so much: otherwise the emoji flickers
const SETTLE = 0.18; // seconds, time constant of the probabilities

/**
 * The 1€ filter (Casiez, Roussel and Vogel 2012) over an array of values: a low pass whose cutoff
 * rises with speed, so that a still face does not tremble and a quick one does not lag.
 *
 * @param {number} cutoff hertz at rest
 * @param {number} beta how much the cutoff rises, per unit of speed
 */
export function oneEuro(cutoff, beta, speedCutoff = 1) {
  let last = new Float32Array(0);
  let speeds;
  let before;
  const share = (hertz, seconds) => 1 / (1 + 1 / (2 * Math.PI * hertz * seconds));
  return function filter(values, time, unit = 1) {
    if (last.length !== values.length) {
      last = Float32Array.from(values);
      speeds = new Float32Array(values.length);
      before = time;
    }
    const seconds = time - before;
    if (!(seconds > 0)) return last.slice();
    before = time;
    const ease = share(speedCutoff, seconds);
    for (let i = 0; i < values.length; i++) {
      speeds[i] += ease * ((values[i] - last[i]) / unit / seconds - speeds[i]);
      const weight = share(cutoff + beta * Math.abs(speeds[i]), seconds);
      last[i] += weight * (values[i] - last[i]);
    }
    return last.slice();
  };
}

/**
 * Follows faces through a video.
 *
 * `update(faces, time)` takes the faces of a frame ({box, eyes, points, probabilities}, in pixels)
 * and its time in seconds, and returns the tracks: the same, smoothed, with an `id`, the `label`
 * (index of the emotion shown), `before` (the one before it) and `since`, when the change came.
 */
export function createTracker() {
  let tracks = [];
  let next = 1;

  function update(faces, time) {
    const free = new Set(faces);
    const pairs = tracks
      .flatMap((track) => faces.map((face) => ({ track, face, shared: overlap(track.raw, face.box) })))
      .filter(({ shared }) => shared > SAME)
      .sort((a, b) => b.shared - a.shared);
    const taken = new Set();
    for (const { track, face } of pairs) {
      if (taken.has(track) || !free.has(face)) continue;
      taken.add(track);
      free.delete(face);
      follow(track, face, time);
    }
    for (const face of free) tracks.push(follow(start(next++), face, time));
    tracks = tracks.filter((track) => time - track.seen <= FORGET);
    return tracks;
  }

  return { update, reset: () => (tracks = []) };
}

function start(id) {
  return {
    id,
    filters: { box: oneEuro(1.2, 4), eyes: oneEuro(1.2, 4), points: oneEuro(1.5, 5) },
    probabilities: null,
    label: -1,
    before: -1,
    since: 0,
    seen: 0,
  };
}

function follow(track, face, time) {
  const side = face.box.right - face.box.left || 1;
  const { left, top, right, bottom } = face.box;
  const box = track.filters.box([left, top, right, bottom], time, side);
  track.raw = face.box;
  track.box = { left: box[0], top: box[1], right: box[2], bottom: box[3] };
  track.eyes = track.filters.eyes(face.eyes, time, side);
  track.points = face.points && track.filters.points(face.points, time, side);
  settle(track, face.probabilities, time);
  track.score = face.score;
  track.seen = time;
  return track;
}

function settle(track, probabilities, time) {
  if (!probabilities) {
    track.probabilities = null;
    track.label = -1;
    return;
  }
  if (track.probabilities?.length !== probabilities.length) {
    track.probabilities = Float32Array.from(probabilities);
  } else {
    const weight = 1 - Math.exp(-Math.max(0, time - track.seen) / SETTLE);
    for (let i = 0; i < probabilities.length; i++) {
      track.probabilities[i] += weight * (probabilities[i] - track.probabilities[i]);
    }
  }
  const best = track.probabilities.indexOf(Math.max(...track.probabilities));
  const lead = track.probabilities[best] - (track.probabilities[track.label] ?? -1);
  if (best !== track.label && lead > TAKES_OVER) {
    track.before = track.label;
    track.label = best;
    track.since = time;
  }
}
