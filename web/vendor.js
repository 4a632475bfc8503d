// Copies what the page fetches at run time out of its packages, so that nothing comes from elsewhere.

import { cpSync, readdirSync, rmSync } from "node:fs";

const PACKAGES = new URL("node_modules/", import.meta.url);
const OUT = new URL("public/vendor/", import.meta.url);

rmSync(OUT, { recursive: true, force: true });
// LiteRT.js picks one of its builds by what the browser can do.
copy("@litertjs/core/wasm/", "litert/", /^litert_wasm_(compat_)?internal\.(js|wasm)$/);
copy("@tensorflow/tfjs-backend-wasm/dist/", "tfjs/", /^tfjs-backend-wasm(-simd)?\.wasm$/);
copy("@mediapipe/face_detection/", "", /^face_detection_short_range\.tflite$/);

function copy(from, to, names) {
  const folder = new URL(from, PACKAGES);
  for (const name of readdirSync(folder).filter((file) => names.test(file))) {
    cpSync(new URL(name, folder), new URL(to + name, OUT));
  }
}
