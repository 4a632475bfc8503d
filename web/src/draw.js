// What is drawn over a frame, and the face that the second tab draws from points alone.

/** The parts of iBUG-68: indices in order, and whether they close. */
export const PARTS = [
  { name: "outline", points: span(0, 16), closed: false },
  { name: "brow", points: span(17, 21), closed: false },
  { name: "brow", points: span(22, 26), closed: false },
  { name: "ridge", points: span(27, 30), closed: false },
  { name: "nostrils", points: span(31, 35), closed: false },
  { name: "eye", points: span(36, 41), closed: true },
  { name: "eye", points: span(42, 47), closed: true },
  { name: "lips", points: span(48, 59), closed: true },
  { name: "mouth", points: span(60, 67), closed: true },
];

const FADE = 0.25; // seconds in which a new emoji takes the old one's place
const EMOJI_SIZE = 1.5; // in sides of the square around the points: hair and chin are hidden too

/** The seven pictures, by label. */
export async function loadEmoji(base, labels) {
  const load = async (label) => {
    const image = new Image();
    image.src = `${base}emoji/${label}.svg`;
    await image.decode();
    return [label, image];
  };
  return new Map(await Promise.all(labels.map(load)));
}

/**
 * Draw the tracks over a frame of the same size.
 *
 * @param {{emoji: boolean, points: boolean, box: boolean}} shown
 * @param {boolean} mirrored whether the frame was drawn the other way round
 */
export function drawTracks(context, tracks, { shown, mirrored, emoji, labels, time }) {
  const { width } = context.canvas;
  for (const track of tracks) {
    const face = mirrored ? flip(track, width) : track;
    const label = labels[track.label];
    if (shown.emoji && label) drawEmoji(context, face, emoji, labels, time);
    if (shown.points && face.points) drawPoints(context, face.points, lineWidth(face.box));
    if (shown.box) drawBox(context, face, label, track.probabilities?.[track.label]);
  }
}

function flip(track, width) {
  const mirror = (x) => width - 1 - x;
  const points = track.points && Float32Array.from(track.points, (v, i) => (i % 2 ? v : mirror(v)));
  const { left, top, right, bottom } = track.box;
  const [ax, ay, bx, by] = track.eyes;
  return {
    ...track,
    box: { left: mirror(right), top, right: mirror(left), bottom },
    eyes: [mirror(bx), by, mirror(ax), ay], // still left of the picture first
    points,
  };
}

function lineWidth(box) {
  return Math.max(1, (box.right - box.left) / 110);
}

function drawEmoji(context, face, emoji, labels, time) {
  const { left, top, right, bottom } = face.box;
  const [ax, ay, bx, by] = face.eyes;
  const side = (right - left) * EMOJI_SIZE;
  const age = Math.min(1, (time - face.since) / FADE);
  context.save();
  // The points end at the brows: the head reaches further up than down.
  context.translate((left + right) / 2, (top + bottom) / 2 - side * 0.07);
  context.rotate(Math.atan2(by - ay, bx - ax));
  const before = emoji.get(labels[face.before]);
  if (before && age < 1) context.drawImage(before, -side / 2, -side / 2, side, side);
  const grown = side * (0.9 + 0.1 * easeOut(age));
  context.globalAlpha = before ? age : 1;
  context.drawImage(emoji.get(labels[face.label]), -grown / 2, -grown / 2, grown, grown);
  context.restore();
}

const easeOut = (t) => 1 - (1 - t) ** 3;

/** Lines along the parts and a dot a point. */
export function drawPoints(context, points, width) {
  context.save();
  context.lineJoin = context.lineCap = "round";
  if (points.length === 136) {
    for (const [colour, extra] of [["rgb(0 0 0 / 0.35)", width], ["rgb(255 255 255 / 0.9)", 0]]) {
      context.strokeStyle = colour;
      context.lineWidth = width + extra;
      for (const part of PARTS) {
        context.beginPath();
        part.points.forEach((i) => context.lineTo(points[2 * i], points[2 * i + 1]));
        if (part.closed) context.closePath();
        context.stroke();
      }
    }
  }
  context.fillStyle = "#ffc83d";
  for (let i = 0; i < points.length; i += 2) {
    context.beginPath();
    context.arc(points[i], points[i + 1], width * 1.5, 0, 2 * Math.PI);
    context.fill();
  }
  context.restore();
}

function drawBox(context, face, label, probability) {
  const { left, top, right, bottom } = face.box;
  const size = Math.max(12, (right - left) / 9);
  context.save();
  context.strokeStyle = "#ffc83d";
  context.lineWidth = lineWidth(face.box) * 1.5;
  context.beginPath();
  context.roundRect(left, top, right - left, bottom - top, size * 0.6);
  context.stroke();
  if (label) {
    const text = `${label} ${Math.round(probability * 100)}%`;
    context.font = `600 ${size}px system-ui, sans-serif`;
    const wide = context.measureText(text).width + size;
    const y = Math.max(0, top - size * 1.9);
    context.fillStyle = "#ffc83d";
    context.beginPath();
    context.roundRect(left, y, wide, size * 1.6, size * 0.5);
    context.fill();
    context.fillStyle = "#221a05";
    context.textBaseline = "middle";
    context.fillText(text, left + size / 2, y + size * 0.85);
  }
  context.restore();
}

/** A face drawn from its 68 points alone, in pixels of the canvas. */
export function drawMask(context, points) {
  const at = (i) => [points[2 * i], points[2 * i + 1]];
  const middle = (a, b) => [(a[0] + b[0]) / 2, (a[1] + b[1]) / 2];
  const unit = Math.hypot(at(16)[0] - at(0)[0], at(16)[1] - at(0)[1]) || 1;
  const fill = (path, style) => ((context.fillStyle = style), context.fill(path));
  const stroke = (path, style, width) => {
    Object.assign(context, { strokeStyle: style, lineWidth: width * unit });
    context.stroke(path);
  };
  context.save();
  context.lineJoin = context.lineCap = "round";

  const chin = at(8);
  const brows = middle(at(19), at(24));
  // The points end at the brows: half an ellipse over the temples makes a forehead.
  const centre = middle(at(0), at(16));
  const across = [(at(16)[0] - at(0)[0]) / 2, (at(16)[1] - at(0)[1]) / 2];
  const crown = [brows[0] + (brows[0] - chin[0]) * 0.35, brows[1] + (brows[1] - chin[1]) * 0.35];
  const arc = (t) => [0, 1].map((k) => centre[k] + across[k] * Math.cos(t) + (crown[k] - centre[k]) * Math.sin(t));
  const head = [...span(0, 16).map(at), ...span(1, 7).map((i) => arc((i * Math.PI) / 8))];
  const shape = smoothPath(head, true);
  const shade = context.createLinearGradient(...crown, ...chin);
  shade.addColorStop(0, "#ffd964");
  shade.addColorStop(1, "#f5a623");
  context.shadowColor = "rgb(0 0 0 / 0.3)";
  context.shadowBlur = unit * 0.08;
  context.shadowOffsetY = unit * 0.03;
  fill(shape, shade);
  context.shadowColor = "transparent";

  for (const [first, last] of [[17, 21], [22, 26]]) stroke(smoothPath(span(first, last).map(at)), "#6b4210", 0.035);
  for (const first of [36, 42]) {
    const lid = smoothPath(span(first, first + 5).map(at), true);
    fill(lid, "#fffdf5");
    context.save();
    context.clip(lid);
    const iris = middle(middle(at(first), at(first + 3)), middle(at(first + 1), at(first + 4)));
    const radius = Math.hypot(at(first + 3)[0] - at(first)[0], at(first + 3)[1] - at(first)[1]) * 0.25;
    context.beginPath();
    context.arc(...iris, radius, 0, 2 * Math.PI);
    context.fillStyle = "#3b2a12";
    context.fill();
    context.restore();
    stroke(lid, "#6b4210", 0.012);
  }
  stroke(smoothPath(span(28, 30).map(at)), "rgb(150 90 10 / 0.35)", 0.02);
  stroke(smoothPath(span(31, 35).map(at)), "#a5681b", 0.022);
  fill(smoothPath(span(48, 59).map(at), true), "#cf4a3c");
  fill(smoothPath(span(60, 67).map(at), true), "#5c1512");
  context.restore();
}

/** A smooth path through points (Catmull–Rom). */
function smoothPath(list, closed = false) {
  const path = new Path2D();
  const n = list.length;
  const get = (i) => (closed ? list[(i + n) % n] : list[Math.min(n - 1, Math.max(0, i))]);
  path.moveTo(...list[0]);
  for (let i = 0; i < (closed ? n : n - 1); i++) {
    const [a, b, c, d] = [get(i - 1), get(i), get(i + 1), get(i + 2)];
    path.bezierCurveTo(
      b[0] + (c[0] - a[0]) / 6, b[1] + (c[1] - a[1]) / 6,
      c[0] - (d[0] - b[0]) / 6, c[1] - (d[1] - b[1]) / 6,
      c[0], c[1],
    );
  }
  if (closed) path.closePath();
  return path;
}

function span(first, last) {
  return Array.from({ length: last - first + 1 }, (_, i) => first + i);
}
