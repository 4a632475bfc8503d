// Runs the predictor in Node: `node node_host.mjs BASE_ADDRESS`.

import * as core from "@tensorflow/tfjs-core";
import * as converter from "@tensorflow/tfjs-converter";
import * as wasm from "@tensorflow/tfjs-backend-wasm";

import { serve } from "./predictor.mjs";
import { tfjs } from "./tfjs.mjs";

// The parent holds the other end of stdin: when it goes, however it goes, so does this process.
process.stdin.on("end", () => process.exit(0));
process.stdin.resume();

const find = () => tfjs({ ...core, ...converter }, wasm);
await serve(process.argv[2], find, { backend: "wasm", threads: 1 });
process.exit(0);
