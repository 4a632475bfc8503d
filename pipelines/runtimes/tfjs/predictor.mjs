// Runs one TF.js graph model for pipelines/runtimes/tfjs.py. The same code serves both hosts, Node
// and a browser page: it asks the loopback address `base` for jobs and posts back what comes out.

const MINIMUM_PAUSE_MS = 50;

/** Open the model, announce it, then answer jobs until there are no more. */
export async function serve(tf, wasm, base) {
  try {
    await start(tf, wasm, base);
    const begun = performance.now();
    const model = await tf.loadGraphModel(`${base}model/model.json`);
    await warmUp(tf, model);
    await post(base, "ready", describe(tf, model, performance.now() - begun));
    for (;;) {
      const job = await nextJob(base);
      if (job === null) return;
      await answer(tf, model, base, job);
    }
  } catch (error) {
    await post(base, "failure", message(error));
  }
}

async function start(tf, wasm, base) {
  // One thread in both hosts, so that their latencies can be compared with the other runtimes'.
  tf.env().set("WASM_HAS_MULTITHREAD_SUPPORT", false);
  wasm.setWasmPaths(`${base}wasm/`, true); // fetch them in Node too, as it does the model
  if (!(await tf.setBackend("wasm"))) throw new Error("the WebAssembly backend did not start");
}

/** Answer one black image: until then a model is not open. */
async function warmUp(tf, model) {
  if (model.inputs.length !== 1) return; // it will be refused
  const shape = model.inputs[0].shape.map((size, axis) => (axis === 0 ? 1 : size));
  const input = tf.zeros(shape);
  await predict(model, input);
  input.dispose();
}

function describe(tf, model, milliseconds) {
  return JSON.stringify({
    version: tf.version_core,
    load_ms: milliseconds,
    memory_mib: tf.memory().numBytes / 2 ** 20, // of tensors, which are the weights
    inputs: model.inputs.map((tensor) => tensor.shape),
    outputs: model.outputs.length,
  });
}

/** The next job, or null when the server has closed. */
async function nextJob(base) {
  for (;;) {
    const response = await fetch(`${base}job`);
    if (response.status === 410) return null;
    if (response.status === 200) {
      return {
        runs: Number(response.headers.get("X-Runs")), // 0: predict; more: time that many runs
        shape: JSON.parse(response.headers.get("X-Shape")),
        images: new Float32Array(await response.arrayBuffer()),
      };
    }
    await new Promise((resolve) => setTimeout(resolve, MINIMUM_PAUSE_MS));
  }
}

async function answer(tf, model, base, { runs, shape, images }) {
  const input = tf.tensor4d(images, shape);
  try {
    if (runs === 0) {
      const output = await predict(model, input);
      await post(base, "outputs", output.values, JSON.stringify(output.shape));
    } else {
      const times = new Float32Array(runs);
      for (let run = 0; run < runs; run++) {
        const start = performance.now();
        await predict(model, input);
        times[run] = performance.now() - start;
      }
      await post(base, "outputs", times, JSON.stringify([runs]));
    }
  } catch (error) {
    await post(base, "failure", message(error));
  } finally {
    input.dispose();
  }
}

async function predict(model, input) {
  const output = model.execute(input);
  const values = await output.data();
  output.dispose();
  return { values, shape: output.shape };
}

function post(base, what, body, shape = "") {
  return fetch(base + what, { method: "POST", headers: { "X-Shape": shape }, body });
}

function message(error) {
  return String(error?.message ?? error);
}
