// The models that come with the page: `models/index.json`, which `python -m pipelines.web` writes.

import { LITERT, TFJS } from "./runtimes.js";

/** The index: [{task, runtime, precision, path, bytes, input, output, source}], or an error. */
export async function readIndex(base) {
  const response = await fetch(`${base}models/index.json`);
  const text = response.ok ? await response.text() : "";
  try {
    return JSON.parse(text).models;
  } catch {
    throw new Error(
      "No models were found: run `python -m pipelines.web` to copy bundles from deploy/ into web/public/models.",
    );
  }
}

/** Open a model: {entry, run(Float32Array): Promise<Float32Array>, close()}, warmed up. */
export async function openModel(entry, base) {
  const [height, width, channels] = entry.input.shape;
  const open = { litert: LITERT, tfjs: TFJS }[entry.runtime];
  const url = `${base}models/${entry.path}`;
  let model;
  try {
    model = await open(url, base);
    const outputs = await model.run([new Float32Array(height * width * channels), [1, height, width, channels]]);
    const expected = entry.output.shape.reduce((product, size) => product * size, 1);
    if (outputs[0].length !== expected) throw new Error("its output has another size than announced");
  } catch (error) {
    throw new Error(`The ${entry.task} model (${entry.runtime}, ${entry.precision}) cannot be used: ${error.message ?? error}`);
  }
  const shape = [1, height, width, channels];
  return {
    entry,
    run: async (pixels) => (await model.run([pixels, shape]))[0],
    close: model.close,
  };
}

/** What the model is called in the page: "LiteRT · int8". */
export function nameOf(entry) {
  return `${{ litert: "LiteRT", tfjs: "TF.js" }[entry.runtime]} · ${entry.precision}`;
}
