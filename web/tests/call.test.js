import { expect, test } from "vitest";

import { onTheWire } from "../src/call.js";

const channel = { type: "data-channel", bytesSent: 900, messagesSent: 30 };
const pair = { type: "candidate-pair", nominated: true, bytesSent: 1000, packetsSent: 10 };
const unused = { ...pair, nominated: false, bytesSent: 7 };

test("what was sent is counted where the browser counts it, headers included", () => {
  const transport = { type: "transport", bytesSent: 2000, packetsSent: 10 };
  expect(onTheWire([channel, transport, pair, unused])).toBe(2000 + 280);
  expect(onTheWire([channel, { type: "transport" }, pair, unused])).toBe(1000 + 280);
  expect(onTheWire([channel, { ...pair, packetsSent: undefined }])).toBe(1000);
  expect(onTheWire([channel, { type: "transport" }, unused])).toBeNaN();
});
