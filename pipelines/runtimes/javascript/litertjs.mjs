// The engine for .tflite files in a browser, see predictor.mjs.

import { Tensor, loadAndCompile, loadLiteRt } from "@litertjs/core";

export function litertjs(version) {
  let litert;
  let cpuOptions;

  async function start(base, { threads }) {
    const options = { threads: threads > 1 };
    litert = await loadLiteRt(`${base}packages/@litertjs/core/wasm/`, options);
    cpuOptions = { numThreads: threads };
    return { version, software: false, threads };
  }

  async function open(base) {
    const model = await loadAndCompile(`${base}model/graph.tflite`, { accelerator: "wasm", cpuOptions });
    return {
      inputs: model.getInputDetails().map(({ shape }) => Array.from(shape)),
      outputs: model.getOutputDetails().length,
      memoryMib: () => litert.liteRtWasm.HEAPU8.length / 2 ** 20, // all that WebAssembly holds
      predict: (values, shape) => predict(model, values, shape),
    };
  }

  return { start, open };
}

/** A TFLite graph takes one image at a time. */
async function predict(model, values, [count, ...sizes]) {
  const each = values.length / count;
  const answers = [];
  let shape;
  for (let i = 0; i < count; i++) {
    const input = new Tensor(values.subarray(i * each, (i + 1) * each), [1, ...sizes]);
    const [output] = await model.run([input]);
    shape = Array.from(output.type.layout.dimensions);
    answers.push(Float32Array.from(await output.data()));
    output.delete();
    input.delete();
  }
  const all = new Float32Array(count * answers[0].length);
  answers.forEach((answer, i) => all.set(answer, i * answer.length));
  return { values: all, shape: [count, ...shape.slice(1)] };
}
