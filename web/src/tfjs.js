// TF.js, loaded only where one of its models is chosen.

import { setWasmPaths } from "@tensorflow/tfjs-backend-wasm";
import { loadGraphModel } from "@tensorflow/tfjs-converter";
import { env, ready, setBackend, tensor } from "@tensorflow/tfjs-core";

let backend;

export async function open(url, base) {
  backend ??= start(base);
  await backend;
  const model = await loadGraphModel(url);
  return {
    async run([values, shape]) {
      const input = tensor(values, shape);
      const output = model.execute(input);
      try {
        return [await output.data()];
      } finally {
        input.dispose();
        output.dispose();
      }
    },
    close: () => model.dispose(),
  };
}

async function start(base) {
  env().set("WASM_HAS_MULTITHREAD_SUPPORT", false);
  setWasmPaths(`${base}vendor/tfjs/`);
  if (!(await setBackend("wasm"))) throw new Error("this browser has no WebAssembly");
  await ready();
}
