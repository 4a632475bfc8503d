// From a frame to the square crop that a model takes: `pipelines/crops.py`, number for number.
//
// Coordinates are in pixels: the centre of the top-left pixel is (0, 0), x to the right, y down.
// An image is {data: Uint8Array, width, height, channels}, row by row, channels interleaved. A
// box is {left, top, right, bottom}.

/** Grey (1 channel) or RGB (3) of a canvas's RGBA pixels; grey as Pillow makes it (ITU-R 601). */
export function fromRgba(rgba, width, height, channels) {
  const count = width * height;
  const data = new Uint8Array(count * channels);
  if (channels === 1) {
    for (let i = 0, p = 0; i < count; i++, p += 4) {
      data[i] = (19595 * rgba[p] + 38470 * rgba[p + 1] + 7471 * rgba[p + 2] + 0x8000) >> 16;
    }
  } else {
    for (let i = 0, p = 0, q = 0; i < count; i++, p += 4, q += 3) {
      data[q] = rgba[p];
      data[q + 1] = rgba[p + 1];
      data[q + 2] = rgba[p + 2];
    }
  }
  return { data, width, height, channels };
}

/** A model's crop, as `input.crop` of its manifest has it, from the square around a face's points. */
export function framed({ left, top, right, bottom }, { margin, up }) {
  const wide = (right - left) * margin;
  const raised = (right - left) * up;
  return { left: left - wide, top: top - wide - raised, right: right + wide, bottom: bottom + wide - raised };
}

/**
 * Resample a square of an image to `size` × `size`; beyond the image its edge pixels repeat.
 *
 * @returns {Float32Array} size · size · channels whole numbers, 0–255.
 */
export function crop(image, box, size) {
  const scale = size / (box.right - box.left);
  if (scale >= 1) return warp(whole(image), box.left, box.top, scale, scale, size);
  const width = Math.max(1, roundHalfEven(image.width * scale));
  const height = Math.max(1, roundHalfEven(image.height * scale));
  // Rounding to whole pixels leaves a little scaling for the warp to do.
  const xScale = (scale * image.width) / width;
  const yScale = (scale * image.height) / height;
  const left = ((box.left + 0.5) * width) / image.width - 0.5;
  const top = ((box.top + 0.5) * height) / image.height - 0.5;
  const columns = range(left, size / xScale, width);
  const rows = range(top, size / yScale, height);
  const part = shrink(image, width, height, columns, rows);
  return warp(part, left, top, xScale, yScale, size);
}

/** Points in [0, 1] of the crop, [x0, y0, x1, …], in pixels of the image. */
export function fromCrop(points, box) {
  const side = box.right - box.left;
  return Float32Array.from(points, (value, i) => value * side + (i % 2 ? box.top : box.left));
}

function roundHalfEven(value) {
  const floor = Math.floor(value);
  const rest = value - floor;
  return rest > 0.5 || (rest === 0.5 && floor % 2 === 1) ? floor + 1 : floor;
}

/** Which pixels of the shrunken image a square needs: all others need not be computed. */
function range(start, length, limit) {
  const clamp = (value) => Math.min(limit - 1, Math.max(0, value));
  return { first: clamp(Math.floor(start) - 1), last: clamp(Math.ceil(start + length) + 2) };
}

function whole(image) {
  return { ...image, x0: 0, y0: 0, fullWidth: image.width, fullHeight: image.height };
}

/** Part of the image shrunk by averaging areas (OpenCV's INTER_AREA). */
function shrink(image, width, height, columns, rows) {
  const { data: source, channels } = image;
  const outWidth = columns.last - columns.first + 1;
  const outHeight = rows.last - rows.first + 1;
  const across = shares(image.width, width, columns);
  const down = shares(image.height, height, rows);
  const sum = new Float32Array(outWidth * channels);
  const data = new Uint8Array(outWidth * outHeight * channels);
  for (let y = 0; y < outHeight; y++) {
    sum.fill(0);
    for (let v = down.starts[y]; v < down.starts[y + 1]; v++) {
      const row = (down.first[y] + v - down.starts[y]) * image.width;
      const share = down.weights[v];
      for (let x = 0, q = 0; x < outWidth; x++, q += channels) {
        let p = (row + across.first[x]) * channels;
        for (let u = across.starts[x]; u < across.starts[x + 1]; u++, p += channels) {
          const weight = share * across.weights[u];
          sum[q] += source[p] * weight;
          if (channels === 3) {
            sum[q + 1] += source[p + 1] * weight;
            sum[q + 2] += source[p + 2] * weight;
          }
        }
      }
    }
    for (let i = 0, q = y * sum.length; i < sum.length; i++, q++) data[q] = roundHalfEven(sum[i]);
  }
  return {
    data,
    width: outWidth,
    height: outHeight,
    channels,
    x0: columns.first,
    y0: rows.first,
    fullWidth: width,
    fullHeight: height,
  };
}

/**
 * The source pixels that each wanted pixel covers: pixel i covers those from first[i] on, with the
 * shares weights[starts[i]] to weights[starts[i + 1] - 1].
 */
function shares(from, to, { first: begin, last: end }) {
  const step = from / to;
  const first = [];
  const starts = [0];
  const weights = [];
  for (let i = begin; i <= end; i++) {
    const left = i * step;
    const right = Math.min(left + step, from);
    const width = right - left;
    let source = Math.floor(left);
    if (source + 1 - left < 1e-3) source += 1; // a hair's breadth of rounding
    first.push(source);
    for (; right - source > 1e-3; source++) {
      weights.push((Math.min(right, source + 1) - Math.max(left, source)) / width);
    }
    starts.push(weights.length);
  }
  return { first: Int32Array.from(first), starts: Int32Array.from(starts), weights: Float32Array.from(weights) };
}

/**
 * Bilinear sampling as OpenCV's warpAffine does it: positions in steps of 1/32 pixel.
 *
 * `part` is a piece, from (x0, y0) on, of an image of fullWidth × fullHeight pixels.
 */
function warp(part, left, top, xScale, yScale, size) {
  const { data, channels, width } = part;
  const result = new Float32Array(size * size * channels);
  const xs = positions(left, xScale, size, part.fullWidth, part.x0, true);
  const ys = positions(top, yScale, size, part.fullHeight, part.y0, false);
  for (let y = 0, q = 0; y < size; y++) {
    const upper = ys.low[y] * width;
    const lower = ys.high[y] * width;
    const fy = ys.part[y];
    for (let x = 0; x < size; x++) {
      const fx = xs.part[x];
      const a = (upper + xs.low[x]) * channels;
      const b = (upper + xs.high[x]) * channels;
      const c = (lower + xs.low[x]) * channels;
      const d = (lower + xs.high[x]) * channels;
      for (let channel = 0; channel < channels; channel++, q++) {
        const above = (32 - fx) * data[a + channel] + fx * data[b + channel];
        const below = (32 - fx) * data[c + channel] + fx * data[d + channel];
        result[q] = ((32 - fy) * above + fy * below + 512) >> 10;
      }
    }
  }
  return result;
}

function positions(start, scale, size, limit, origin, apart) {
  const low = new Int32Array(size);
  const high = new Int32Array(size);
  const part = new Int32Array(size);
  const clamp = (value) => Math.min(limit - 1, Math.max(0, value)) - origin;
  const begin = start + 0.5 / scale;
  const step = 1 / scale;
  for (let i = 0; i < size; i++) {
    // Columns are rounded in two parts, rows in one, as there.
    const sum = apart
      ? roundHalfEven(begin * 1024) + roundHalfEven(step * i * 1024)
      : roundHalfEven((step * i + begin) * 1024);
    const fixed = (sum + 16) >> 5;
    low[i] = clamp(fixed >> 5);
    high[i] = clamp((fixed >> 5) + 1);
    part[i] = fixed & 31;
  }
  return { low, high, part };
}
