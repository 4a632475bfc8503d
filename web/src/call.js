// A call of landmarks over a WebRTC data channel, without any server: the two sides exchange one
// text each, by copy and paste, or find each other in two tabs of one browser.

import { createDecoder, createEncoder } from "./codec.js";

const RATE = 30; // frames a second
const LIMIT = 60_000; // bits a second on the wire
// Each message travels alone, in SCTP, DTLS, UDP and IP headers, and is acknowledged in part.
const OVERHEAD_BYTES = 100;
const GATHER_MS = 2000; // to find this machine's addresses
const PLEASE_SEND_A_KEY = Uint8Array.of(75);
const CHANNEL = "grimace-call";

/**
 * @param {(state: string) => void} onState "idle", "waiting", "connected" or "closed"
 * @param {(face: object | null) => void} onFace what the other side sends, as `createDecoder`
 * @returns {{invite, accept, complete, findTab, send, statistics, hangUp}}
 */
export function createCall(onState, onFace) {
  let peer = null;
  let channel = null;
  let state = "idle";
  let encode;
  let decode;
  let wantKey = true;
  let budget = LIMIT / 8;
  let before = 0;
  let counts = noCounts();
  const id = Math.random();
  const tabs = new BroadcastChannel(CHANNEL);
  tabs.onmessage = ({ data }) => hear(data).catch(() => tell("closed"));

  function tell(next) {
    state = next;
    onState(next);
  }

  function open() {
    hangUp("waiting");
    peer = new RTCPeerConnection(); // without servers: only addresses of this network
    peer.onconnectionstatechange = ({ target }) => {
      if (target === peer && ["failed", "disconnected", "closed"].includes(peer.connectionState)) hangUp("closed");
    };
    // Late frames are worth nothing: what is lost stays lost, and a key follows.
    channel = peer.createDataChannel("landmarks", { negotiated: true, id: 1, ordered: true, maxRetransmits: 0 });
    channel.binaryType = "arraybuffer";
    encode = createEncoder();
    decode = createDecoder();
    wantKey = true;
    counts = noCounts();
    channel.onopen = () => tell("connected");
    channel.onclose = ({ target }) => target === channel && hangUp("closed");
    channel.onmessage = ({ data }) => receive(new Uint8Array(data));
  }

  function receive(bytes) {
    counts.bytesIn += bytes.length;
    if (bytes.length === 1) {
      wantKey = true;
      return;
    }
    counts.framesIn += 1;
    const message = decode(bytes);
    if (message) onFace(message.face);
    else channel.send(PLEASE_SEND_A_KEY);
  }

  /** Send a face ({points in pixels, emotion}) of a picture, or null; at most RATE a second. */
  function send(face, width, height, time) {
    if (channel?.readyState !== "open") return;
    const seconds = time - before;
    if (seconds < 0.9 / RATE) return;
    before = time;
    budget = Math.min(LIMIT / 8, budget + (seconds * LIMIT) / 8);
    if (budget < OVERHEAD_BYTES * 2) return; // a frame less, when a restless face costs too much
    const message = encode(
      face && {
        points: Float32Array.from(face.points, (value) => value / width),
        emotion: Math.max(0, face.emotion),
        aspect: height / width,
      },
      wantKey,
    );
    wantKey = false;
    channel.send(message);
    budget -= message.length + OVERHEAD_BYTES;
    counts.framesOut += 1;
    counts.bytesOut += message.length;
  }

  /** Totals since the call began; `wireOut` counts all bytes sent below SCTP, DTLS included. */
  async function statistics() {
    let wireOut = 0;
    if (peer) {
      for (const report of (await peer.getStats()).values()) {
        // IPv4 and UDP headers, 28 bytes a packet, are not in the browser's count.
        if (report.type === "transport") wireOut += report.bytesSent + 28 * (report.packetsSent ?? 0);
      }
    }
    return { ...counts, wireOut };
  }

  async function invite() {
    open();
    await peer.setLocalDescription(await peer.createOffer());
    return describe(peer);
  }

  async function accept(text) {
    const offer = parse(text, "offer");
    open();
    await peer.setRemoteDescription(offer);
    await peer.setLocalDescription(await peer.createAnswer());
    return describe(peer);
  }

  async function complete(text) {
    if (peer?.signalingState !== "have-local-offer") throw new Error("Create an invitation first.");
    await peer.setRemoteDescription(parse(text, "answer"));
  }

  async function findTab() {
    tabs.postMessage({ from: id, offer: await invite() });
  }

  async function hear({ from, to, offer, answer }) {
    if (offer && state !== "connected") tabs.postMessage({ from: id, to: from, answer: await accept(offer) });
    if (answer && to === id && peer?.signalingState === "have-local-offer") await complete(answer);
  }

  function hangUp(next = "idle") {
    const [oldPeer, oldChannel] = [peer, channel];
    peer = channel = null;
    oldChannel?.close();
    oldPeer?.close();
    tell(next);
  }

  return { invite, accept, complete, findTab, send, statistics, hangUp: () => hangUp() };
}

function noCounts() {
  return { framesIn: 0, bytesIn: 0, framesOut: 0, bytesOut: 0 };
}

/** The local description as text, when the machine's addresses are in it. */
async function describe(peer) {
  await new Promise((resolve) => {
    if (peer.iceGatheringState === "complete") resolve();
    peer.addEventListener("icegatheringstatechange", () => peer.iceGatheringState === "complete" && resolve());
    setTimeout(resolve, GATHER_MS);
  });
  const { type, sdp } = peer.localDescription;
  return btoa(JSON.stringify({ type, sdp }));
}

function parse(text, type) {
  try {
    const description = JSON.parse(atob(text.trim()));
    if (description.type === type) return description;
  } catch {
    // said below
  }
  throw new Error(
    type === "offer"
      ? "This is no invitation: paste the whole text that the other side copied."
      : "This is no reply: paste the whole text that the other side copied after your invitation.",
  );
}
