// A call of landmarks over a WebRTC data channel, without any server: the two sides exchange one
// text each, by copy and paste, or find each other in two tabs of one browser.

import { createDecoder, createEncoder } from "./codec.js";

const RATE = 30; // frames a second
const LIMIT = 60_000; // bits a second on the wire
const BURST_BYTES = LIMIT / 8 / 10; // what may be sent at once: a tenth of a second's share
// Each message travels alone, in SCTP, DTLS, UDP and IP headers, and is acknowledged in part.
const OVERHEAD_BYTES = 100;
const GATHER_MS = 2000; // to find this machine's addresses
const ANSWER_MS = 8000; // for another window to answer and to connect
const PLEASE_SEND_A_KEY = Uint8Array.of(75);
const CHANNEL = "grimace-call";

/**
 * @param {(state: string, why: string) => void} onState "idle", "waiting", "connected" or "closed";
 *   where nobody asked for it, why
 * @param {(face: object | null) => void} onFace what the other side sends, as `createDecoder`
 * @returns {{invite, accept, complete, findTab, send, statistics, hangUp}} `invite` and `accept`
 *   give a text for the other side; "" if the call was given up meanwhile
 */
export function createCall(onState, onFace) {
  let peer = null;
  let channel = null;
  let state = "idle";
  let isCalling = false; // other windows, and none has said yet that it is here
  let partner = null; // the window that called this one, or that this one offers a call
  let patience;
  let encode;
  let decode;
  let wantKey = true;
  let hasFace = false;
  let budget = BURST_BYTES;
  let before = 0;
  let counts = noCounts();
  const id = Math.random();
  const tabs = new BroadcastChannel(CHANNEL);
  tabs.onmessage = ({ data }) => hear(data).catch(() => hangUp("closed"));

  function tell(next, why = "") {
    state = next;
    onState(next, why);
  }

  function open() {
    drop();
    const mine = new RTCPeerConnection(); // without servers: only addresses of this network
    peer = mine;
    peer.onconnectionstatechange = () => {
      if (mine !== peer || !["failed", "disconnected", "closed"].includes(mine.connectionState)) return;
      hangUp("closed", state === "waiting" ? "The other side cannot be reached: both must be in one network." : "");
    };
    // Late frames are worth nothing: what is lost stays lost, and a key follows.
    channel = peer.createDataChannel("landmarks", { negotiated: true, id: 1, ordered: true, maxRetransmits: 0 });
    channel.binaryType = "arraybuffer";
    encode = createEncoder();
    decode = createDecoder();
    wantKey = true;
    counts = noCounts();
    channel.onopen = () => {
      clearTimeout(patience);
      tell("connected");
    };
    channel.onclose = ({ target }) => target === channel && hangUp("closed");
    channel.onmessage = ({ data }) => receive(new Uint8Array(data));
    return mine;
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
    const isLeaving = hasFace && !face; // never left out: a face that is gone must not stay in view
    const seconds = time - before;
    if (seconds < 0.9 / RATE && !isLeaving) return;
    before = time;
    budget = Math.min(BURST_BYTES, budget + (seconds * LIMIT) / 8);
    if (budget < OVERHEAD_BYTES * 2 && !isLeaving) return; // when a restless face costs too much
    const message = encode(
      face && {
        points: Float32Array.from(face.points, (value) => value / width),
        emotion: face.emotion,
        aspect: height / width,
      },
      wantKey,
    );
    wantKey = false;
    hasFace = face !== null;
    channel.send(message);
    budget -= message.length + OVERHEAD_BYTES;
    counts.framesOut += 1;
    counts.bytesOut += message.length;
  }

  /** Totals since the call began; `wireOut`: as `onTheWire` has it, 0 before there is a peer. */
  async function statistics() {
    return { ...counts, wireOut: peer ? onTheWire([...(await peer.getStats()).values()]) : 0 };
  }

  async function invite() {
    hangUp("waiting");
    return offered();
  }

  async function accept(text) {
    const offer = parse(text, "offer");
    hangUp("waiting");
    return answered(offer);
  }

  async function complete(text) {
    if (peer?.signalingState !== "have-local-offer") throw new Error("Create an invitation first.");
    await peer.setRemoteDescription(parse(text, "answer"));
  }

  function offered() {
    const mine = open();
    return describe(mine, async () => mine.setLocalDescription(await mine.createOffer()));
  }

  function answered(offer) {
    const mine = open();
    return describe(mine, async () => {
      await mine.setRemoteDescription(offer);
      await mine.setLocalDescription(await mine.createAnswer());
    });
  }

  /** What `prepare` makes of a peer, as text, when the machine's addresses are in it. */
  async function describe(mine, prepare) {
    try {
      await prepare();
      await gathered(mine);
    } catch (error) {
      if (mine === peer) throw error; // else it was closed under way
    }
    if (mine !== peer) return "";
    const { type, sdp } = mine.localDescription;
    return btoa(JSON.stringify({ type, sdp }));
  }

  /** Call all other windows; whoever says first that it is here gets the offer, and it alone. */
  function findTab() {
    if (partner !== null) return; // called by another window at this moment
    hangUp("waiting");
    isCalling = true;
    expectAnswer();
    tabs.postMessage({ from: id, isCall: true });
  }

  async function hear({ from, to, isCall, isHere, offer, answer }) {
    // Where both call at once, the call of the smaller id counts.
    if (isCall && (["idle", "closed"].includes(state) || (isCalling && from < id))) {
      hangUp("waiting");
      partner = from;
      expectAnswer();
      tabs.postMessage({ from: id, to: from, isHere: true });
    } else if (isHere && to === id && isCalling) {
      isCalling = false;
      partner = from;
      const text = await offered();
      if (text) tabs.postMessage({ from: id, to: from, offer: text });
    } else if (offer && from === partner) {
      if (to !== id) return hangUp(); // another was faster
      const text = await answered(parse(offer, "offer"));
      if (text) tabs.postMessage({ from: id, to: from, answer: text });
    } else if (answer && to === id && from === partner) {
      await complete(answer);
    }
  }

  function expectAnswer() {
    patience = setTimeout(() => {
      hangUp("idle", "No other window answered. Is this page open in one, with this tab chosen?");
    }, ANSWER_MS);
  }

  function hangUp(next = "idle", why = "") {
    clearTimeout(patience);
    partner = null;
    isCalling = false;
    drop();
    tell(next, why);
  }

  function drop() {
    const [oldPeer, oldChannel] = [peer, channel];
    peer = channel = null;
    hasFace = false;
    oldChannel?.close();
    oldPeer?.close();
  }

  return { invite, accept, complete, findTab, send, statistics, hangUp: () => hangUp() };
}

/**
 * Bytes sent so far below SCTP, DTLS included: of the transport or, in browsers that do not count
 * there, of the pair of addresses in use; NaN where neither counts.
 *
 * @param {object[]} reports of `RTCPeerConnection.getStats`
 */
export function onTheWire(reports) {
  const counting = reports.filter(({ bytesSent }) => Number.isFinite(bytesSent));
  const transports = counting.filter(({ type }) => type === "transport");
  const pairs = counting.filter(({ type, nominated }) => type === "candidate-pair" && nominated);
  const used = transports.length ? transports : pairs;
  // IPv4 and UDP headers, 28 bytes a packet, are not in the browser's count.
  const sent = ({ bytesSent, packetsSent }) => bytesSent + 28 * (packetsSent ?? 0);
  return used.length ? used.reduce((sum, report) => sum + sent(report), 0) : NaN;
}

function noCounts() {
  return { framesIn: 0, bytesIn: 0, framesOut: 0, bytesOut: 0 };
}

async function gathered(peer) {
  await new Promise((resolve) => {
    if (peer.iceGatheringState === "complete") resolve();
    peer.addEventListener("icegatheringstatechange", () => peer.iceGatheringState === "complete" && resolve());
    setTimeout(resolve, GATHER_MS);
  });
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
