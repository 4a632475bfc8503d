// One frame through all networks: faces, their points, their emotions, and how long each took.

import { crop, fromCrop, fromRgba, framed } from "./crop.js";
import { SIDE, findFaces } from "./detector.js";
import { openModel } from "./models.js";
import { LITERT } from "./runtimes.js";

const MOST_FACES = 10;

/**
 * @param {string} base address of the page's folder, ending in "/"
 * @returns an analyser: `use(entry)` opens a model for its task, `drop(task)` closes it,
 *   `analyse(frame, still)` takes ImageData and gives {faces, times}: faces as `findFaces`, with
 *   `points` (Float32Array [x0, y0, …] in pixels) and `probabilities` where there are models; times
 *   in milliseconds, by stage.
 */
export async function createAnalyser(base) {
  const detector = await LITERT(`${base}vendor/face_detection_short_range.tflite`, base);
  const models = {};

  async function network(pixels) {
    const outputs = await detector.run([pixels, [1, SIDE, SIDE, 3]]);
    const [boxes, logits] = outputs[0].length > outputs[1].length ? outputs : outputs.toReversed();
    return { boxes, logits };
  }

  // One at a time: a model must not be closed while a frame is in it.
  let turn = Promise.resolve();
  const inTurn = (work) => (...given) => (turn = turn.catch(() => {}).then(() => work(...given)));

  async function use(entry) {
    const opened = await openModel(entry, base);
    await inTurn(() => {
      models[entry.task]?.close();
      models[entry.task] = opened;
    })();
  }

  async function drop(task) {
    await inTurn(() => {
      models[task]?.close();
      delete models[task];
    })();
  }

  async function analyse(frame, still = false) {
    const { width, height, data } = frame;
    const times = { detect: 0, landmarks: 0, emotion: 0 };
    const timed = async (stage, work) => {
      const start = performance.now();
      const result = await work();
      times[stage] += performance.now() - start;
      return result;
    };
    // Each stage's time has in it what it needs; the model that comes first pays for the grey one.
    const first = models.landmarks ? "landmarks" : "emotion";
    const rgb = await timed("detect", () => fromRgba(data, width, height, 3));
    const grey = await timed(first, () => fromRgba(data, width, height, 1));
    const answer = async (model, box) => {
      const { shape, crop: placing } = model.entry.input;
      const square = framed(box, placing);
      const pixels = crop(shape[2] === 1 ? grey : rgb, square, shape[0]);
      return { square, output: await model.run(pixels) };
    };
    const found = await timed("detect", () => findFaces(rgb, network, still));
    const faces = found.slice(0, MOST_FACES);
    for (const face of faces) {
      const { landmarks, emotion } = models;
      if (landmarks) {
        const { square, output } = await timed("landmarks", () => answer(landmarks, face.box));
        face.points = fromCrop(output, square);
      }
      if (emotion) {
        face.probabilities = (await timed("emotion", () => answer(emotion, face.box))).output;
      }
    }
    return { faces, times };
  }

  return { use, drop, analyse: inTurn(analyse) };
}
