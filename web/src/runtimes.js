// Two ways to run a network in the browser, both in WebAssembly on one thread.
//
// Each opens a URL and gives {run([values, shape]): Promise<Float32Array[]>, close()}: one input,
// the outputs as they come.

import { Tensor, loadAndCompile, loadLiteRt } from "@litertjs/core";

let litert;

/** A .tflite file in LiteRT.js. */
export async function LITERT(url, base) {
  litert ??= loadLiteRt(`${base}vendor/litert/`);
  await litert;
  const file = await bytesOf(url);
  const model = await loadAndCompile(file, { accelerator: "wasm" });
  return {
    async run([values, shape]) {
      const input = new Tensor(values, shape);
      const outputs = await model.run([input]);
      const results = [];
      for (const output of outputs) {
        results.push(Float32Array.from(await output.data()));
        output.delete();
      }
      input.delete();
      return results;
    },
    close: () => model.delete(),
  };
}

/** A TF.js graph model (its model.json), in TF.js's WebAssembly backend. */
export async function TFJS(url, base) {
  const { open } = await import("./tfjs.js"); // only for those who choose it
  return open(url, base);
}

async function bytesOf(url) {
  const response = await fetch(url);
  const type = response.headers.get("Content-Type") ?? "";
  if (!response.ok || type.startsWith("text/html")) throw new Error(`${url} is missing`);
  return new Uint8Array(await response.arrayBuffer());
}
