// Answers the jobs of pipelines/runtimes/javascript.py with one model. The same code serves a browser
// page and Node: it asks the loopback address `base` for jobs and posts back what comes out.
//
// An engine, `tfjs.mjs` or `litertjs.mjs`, has `start`, which gives {version, software} or throws
// where the machine lacks what it needs, and `open`, which gives {inputs, outputs, memoryMib,
// predict}: shapes, their number, MiB or null, and a function of values and shape to the same.

const MINIMUM_PAUSE_MS = 50;

/** Start the engine, open the model, announce it, then answer jobs until there are no more. */
export async function serve(base, find, asked) {
  let engine;
  let host;
  try {
    engine = await find();
    host = await engine.start(base, asked);
  } catch (error) {
    await post(base, "absent", message(error));
    return;
  }
  try {
    const begun = performance.now();
    const model = await engine.open(base);
    await warmUp(model);
    await post(base, "ready", describe(host, model, performance.now() - begun));
    for (;;) {
      const job = await nextJob(base);
      if (job === null) return;
      await answer(model, base, job);
    }
  } catch (error) {
    await post(base, "failure", message(error));
  }
}

/** Answer one black image: until then a model is not open. */
async function warmUp(model) {
  if (model.inputs.length !== 1) return; // it will be refused
  const shape = [1, ...model.inputs[0].slice(1)];
  const size = shape.reduce((product, side) => product * side, 1);
  await model.predict(new Float32Array(Math.max(0, size)), shape);
}

function describe(host, model, milliseconds) {
  return JSON.stringify({
    ...host,
    load_ms: milliseconds,
    memory_mib: model.memoryMib(),
    inputs: model.inputs,
    outputs: model.outputs,
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

async function answer(model, base, { runs, shape, images }) {
  try {
    if (runs === 0) {
      const output = await model.predict(images, shape);
      await post(base, "outputs", output.values, JSON.stringify(output.shape));
    } else {
      const times = new Float32Array(runs);
      for (let run = 0; run < runs; run++) {
        const start = performance.now();
        await model.predict(images, shape);
        times[run] = performance.now() - start;
      }
      await post(base, "outputs", times, JSON.stringify([runs]));
    }
  } catch (error) {
    await post(base, "failure", message(error));
  }
}

function post(base, what, body, shape = "") {
  return fetch(base + what, { method: "POST", headers: { "X-Shape": shape }, body });
}

function message(error) {
  return String(error?.message ?? error);
}
