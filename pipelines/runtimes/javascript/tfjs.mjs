// The engine for TF.js graph models, see predictor.mjs.

const SOFTWARE = /swiftshader|llvmpipe|softpipe/i;

/**
 * @param tf what tfjs-core and tfjs-converter export.
 * @param wasm what tfjs-backend-wasm exports; of the other backends nothing is needed.
 */
export function tfjs(tf, wasm) {
  async function start(base, { backend, threads }) {
    let software = false;
    if (backend === "wasm") {
      tf.env().set("WASM_HAS_MULTITHREAD_SUPPORT", threads > 1);
      if (threads > 1) wasm.setThreadsCount(threads);
      const inNode = typeof window === "undefined"; // where it would look for a file
      wasm.setWasmPaths(`${base}packages/@tensorflow/tfjs-backend-wasm/dist/`, inNode);
    } else {
      software = SOFTWARE.test(await (backend === "webgl" ? webgl() : webgpu()));
    }
    if (!(await tf.setBackend(backend))) throw new Error(`TF.js could not start ${backend}`);
    await tf.ready();
    const running = backend === "wasm" && threads > 1 ? wasm.getThreadsCount() : 1;
    return { version: tf.version_core, software, threads: running };
  }

  async function open(base) {
    const model = await tf.loadGraphModel(`${base}model/model.json`);
    return {
      inputs: model.inputs.map((tensor) => tensor.shape),
      outputs: model.outputs.length,
      memoryMib: () => tf.memory().numBytes / 2 ** 20, // of tensors, which are the weights
      async predict(values, shape) {
        const input = tf.tensor(values, shape);
        const output = model.execute(input);
        try {
          return { values: await output.data(), shape: output.shape };
        } finally {
          input.dispose();
          output.dispose();
        }
      },
    };
  }

  return { start, open };
}

/** Who draws: the GPU's name, or SwiftShader's where there is none. */
function webgl() {
  const gl = new OffscreenCanvas(1, 1).getContext("webgl2");
  if (!gl) throw new Error("this browser offers no WebGL 2 here");
  const names = gl.getExtension("WEBGL_debug_renderer_info");
  return gl.getParameter(names ? names.UNMASKED_RENDERER_WEBGL : gl.RENDERER);
}

async function webgpu() {
  const adapter = await navigator.gpu?.requestAdapter();
  if (!adapter) throw new Error("this browser offers no WebGPU adapter here");
  const { vendor, architecture, device, description } = adapter.info;
  return [vendor, architecture, device, description].join(" ");
}
