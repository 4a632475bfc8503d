// Runs the predictor in Node: `node node_host.mjs BASE_ADDRESS`.

import * as core from "@tensorflow/tfjs-core";
import * as converter from "@tensorflow/tfjs-converter";
import * as wasm from "@tensorflow/tfjs-backend-wasm";

import { serve } from "./predictor.mjs";

// The parent holds the other end of stdin: when it goes, however it goes, so does this process.
process.stdin.on("end", () => process.exit(0));
process.stdin.resume();

await serve({ ...core, ...converter }, wasm, process.argv[2]);
process.exit(0);
