// The page: sources, the frame loop, and what is shown.

import "./style.css";
import { createAnalyser } from "./analyser.js";
import { createCall } from "./call.js";
import { drawMask, drawPoints, drawTracks, loadEmoji } from "./draw.js";
import { nameOf, readIndex } from "./models.js";
import { createTracker } from "./smooth.js";
import { SourceError, openCamera, openFile, openPicture } from "./source.js";

const BASE = new URL(import.meta.env.BASE_URL, location.href).href;
const SAMPLE = `${BASE}sample.jpg`;
const LABELS = ["angry", "disgust", "fear", "happy", "neutral", "sad", "surprise"];
const $ = (id) => document.getElementById(id);

const canvas = $("stage");
const context = canvas.getContext("2d");
const frame = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const tracker = createTracker();
const shown = { emoji: true, points: false, box: false };

let analyser;
let emoji = new Map();
let source = null;
let labels = LABELS;
let last = { tracks: [], time: 0 };
let rate = 0;
const speed = { written: 0 };
let generation = 0; // of the source: what was begun for an older one is dropped
let asked = 0; // for a source, how often: the last wish counts, whichever opens first

async function main() {
  wire();
  try {
    say("Loading the models …");
    const [index, opened, pictures] = await Promise.all([readIndex(BASE), createAnalyser(BASE), loadEmoji(BASE, LABELS)]);
    analyser = opened;
    emoji = pictures;
    const failures = [];
    for (const task of ["emotion", "landmarks"]) {
      failures.push(...(await offer(task, index.filter((entry) => entry.task === task))));
    }
    say(failures.join(" "), true);
    document.body.dataset.ready = "true";
    refresh();
    keepOffline(index);
  } catch (error) {
    say(error.message, true);
  }
}

/** Fill a task's list of models and open the first that opens; say which before it did not. */
async function offer(task, entries) {
  const select = $(`${task}-model`);
  entries.forEach((entry, i) => select.add(new Option(`${nameOf(entry)} · ${kilobytes(entry.bytes)}`, i)));
  select.add(new Option("off", ""));
  let current = "";
  const choose = async (value) => {
    if (value === "") analyser.drop(task);
    else {
      say(`Opening ${nameOf(entries[value])} …`);
      await analyser.use(entries[value]);
      if (task === "emotion") labels = entries[value].output.labels;
    }
    current = value;
    say("");
  };
  select.onchange = async () => {
    select.disabled = true;
    try {
      await choose(select.value);
      tracker.reset();
      refresh();
    } catch (error) {
      select.value = current;
      say(error.message, true);
    }
    select.disabled = false;
  };
  const failures = [];
  for (const place of entries.keys()) {
    try {
      await choose(String(place));
      break;
    } catch (error) {
      console.error(error);
      failures.push(`${nameOf(entries[place])} did not open: ${error.message ?? error}`);
    }
  }
  select.value = current; // "off" where none opens
  return failures;
}

function kilobytes(bytes) {
  return bytes < 1e6 ? `${Math.round(bytes / 1000)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

// sources

async function start(open) {
  const wish = ++asked;
  try {
    say("Opening …");
    const opened = await open();
    if (wish !== asked) return opened.stop();
    source?.stop();
    source = opened;
  } catch (error) {
    if (wish !== asked) return;
    if (!(error instanceof SourceError)) console.error(error);
    say(error.message, true);
    return;
  }
  generation += 1;
  tracker.reset();
  last = { tracks: [], time: 0 };
  rate = 0;
  resize();
  document.body.dataset.source = source.kind;
  say(source.note);
  if (source.still) refresh();
  else {
    const current = generation; // not what it will be when the frame comes
    source.next((time) => tick(time, current));
    source.lost.then((why) => current === generation && stop(why));
  }
}

function resize() {
  for (const target of [canvas, frame.canvas]) Object.assign(target, { width: source.width, height: source.height });
}

function stop(why = "") {
  if (source) {
    source.stop();
    // The last frame is not to stay behind what comes next.
    for (const { canvas: drawn } of [context, frame, $("self").getContext("2d")]) Object.assign(drawn, { width: drawn.width });
    $("stage-note").textContent = "";
  }
  source = null;
  generation += 1;
  asked += 1;
  tracker.reset();
  last = { tracks: [], time: 0 };
  delete document.body.dataset.source;
  showFace(null);
  showSpeed(null);
  sendFace();
  say(why, true);
}

/** A still picture again, after something about it changed. */
function refresh() {
  if (source?.still) step(performance.now() / 1000, generation);
}

async function tick(time, current) {
  if (current !== generation) return;
  if (source.resized?.()) {
    resize();
    tracker.reset();
  }
  await step(time, current);
  if (current === generation) source.next((next) => tick(next, current));
}

async function step(time, current) {
  const { still, width, height } = source;
  const begun = performance.now();
  source.draw(frame, width, height);
  if (!analyser) return render(); // the models are still on their way
  const pixels = frame.getImageData(0, 0, width, height);
  let result;
  try {
    result = await analyser.analyse(pixels, still);
  } catch (error) {
    if (current !== generation) return;
    stop(`The models failed on this picture: ${error.message ?? error}`);
    return;
  }
  if (current !== generation) return;
  const elapsed = performance.now() - begun;
  const seconds = time - last.time;
  const alone = last.time === 0 || still;
  if (!alone && seconds > 0) rate += (1 / seconds - rate) * (rate ? 0.1 : 1);
  const tracks = tracker.update(result.faces, time);
  last = { tracks, time };
  render();
  calm({ rate: still ? 0 : rate, elapsed, ...result.times }, alone);
  showSpeed(result.faces.length);
  const biggest = largest(tracks);
  showFace(biggest);
  $("stage-note").textContent = result.faces.length ? "" : "No face in view";
  sendFace(time);
  document.body.dataset.frames = Number(document.body.dataset.frames ?? 0) + 1;
  document.body.dataset.faces = result.faces.length;
}

function render() {
  if (!source) return;
  const { mirrored, still } = source;
  const { width, height } = canvas;
  context.save();
  if (mirrored) {
    context.translate(width, 0);
    context.scale(-1, 1);
  }
  context.drawImage(frame.canvas, 0, 0);
  context.restore();
  // A still picture has no time in which an emoji could fade in.
  const time = still ? Infinity : last.time;
  drawTracks(context, last.tracks, { shown, mirrored, emoji, labels, time });
  if (!$("call").hidden) renderSelf();
}

function largest(tracks) {
  const side = ({ box }) => box.right - box.left;
  return tracks.reduce((best, track) => (!best || side(track) > side(best) ? track : best), null);
}

// what the panel says

function showFace(track) {
  const label = track ? labels[track.label] : undefined;
  showEmoji($("face-emoji"), label);
  $("face-label").textContent = label ?? "–";
  canvas.ariaLabel = describe(label);
  const bars = $("bars");
  if (bars.children.length !== labels.length) {
    bars.replaceChildren(...labels.map(bar));
  }
  labels.forEach((name, i) => {
    const share = track?.probabilities?.[i] ?? 0;
    const row = bars.children[i];
    row.classList.toggle("best", name === label);
    row.querySelector(".fill").style.transform = `scaleX(${share})`;
    row.querySelector(".value").textContent = track?.probabilities ? `${Math.round(share * 100)}%` : "";
  });
}

/** What the stage shows, for who does not see it. */
function describe(label) {
  if (!source) return "Nothing is open";
  const faces = last.tracks.length;
  const what = { camera: "The camera's picture", video: "The video" }[source.kind] ?? "The picture";
  if (!faces) return `${what}: no face in view`;
  return `${what}: ${faces === 1 ? "one face" : `${faces} faces, the largest`}${label ? `, ${label}` : ""}`;
}

/** Put a label's emoji into an image, or hide that where there is no label. */
function showEmoji(picture, label) {
  picture.hidden = !label;
  if (!label || picture.dataset.label === label) return;
  picture.src = `${BASE}emoji/${label}.svg`;
  picture.dataset.label = label;
}

function bar(name) {
  const row = document.createElement("li");
  row.innerHTML = '<span class="name"></span><span class="track"><span class="fill"></span></span><span class="value"></span>';
  row.querySelector(".name").textContent = name;
  return row;
}

/** Average the figures over the last frames, or begin anew. */
function calm(now, anew) {
  for (const [key, value] of Object.entries(now)) {
    speed[key] = anew ? value : speed[key] + (value - speed[key]) * 0.1;
  }
}

function showSpeed(faces) {
  const now = performance.now();
  if (faces !== null && !source.still && now - speed.written < 250) return; // legible
  speed.written = now;
  const text = (id, value) => ($(id).textContent = value);
  const ms = (value) => (faces !== null && value ? `${value.toFixed(1)} ms` : "–");
  text("rate", faces !== null && speed.rate ? speed.rate.toFixed(0) : "–");
  text("latency", faces !== null ? speed.elapsed.toFixed(speed.elapsed < 10 ? 1 : 0) : "–");
  text("faces", faces ?? "–");
  for (const stage of ["detect", "landmarks", "emotion"]) text(`ms-${stage}`, ms(speed[stage]));
}

function say(text, isError = false) {
  const status = $("status");
  status.textContent = text;
  status.classList.toggle("error", isError && text !== "");
}

// the call

const own = $("self").getContext("2d");
const other = $("other").getContext("2d");
const call = createCall(showState, showOther);
let counted = { time: 0 };
setInterval(() => {
  showTraffic();
  // What does not move is told again, for whom it did not reach; a hidden page gets no more frames.
  if (!source || source.still || document.hidden) sendFace();
}, 1000);

/** Send the largest face, or that there is none. */
function sendFace(time = performance.now() / 1000) {
  const isFrozen = document.hidden && !source?.still;
  const face = isFrozen ? null : largest(last.tracks);
  const { width, height } = canvas;
  const emotion = LABELS.indexOf(labels[face?.label]);
  call.send(face?.points ? { points: face.points, emotion } : null, width, height, time);
}

function renderSelf() {
  const { width, height } = canvas;
  Object.assign(own.canvas, { width, height });
  const { mirrored } = source;
  own.save();
  if (mirrored) {
    own.translate(width, 0);
    own.scale(-1, 1);
  }
  own.drawImage(frame.canvas, 0, 0);
  const face = largest(last.tracks);
  if (face?.points) drawPoints(own, face.points, Math.max(1, (face.box.right - face.box.left) / 110));
  own.restore();
}

function showOther(face) {
  const { width } = other.canvas;
  if (face) other.canvas.height = Math.round(width * face.aspect);
  else other.clearRect(0, 0, width, other.canvas.height);
  $("other-note").textContent = face ? "" : "The other side shows no face";
  showEmoji($("other-emoji"), LABELS[face?.emotion]);
  if (!face || face.points.length !== 136) return;
  other.save();
  other.translate(width, 0); // as in a mirror, like one's own picture
  other.scale(-1, 1);
  drawMask(other, face.points.map((value) => value * width));
  other.restore();
  document.body.dataset.received = Number(document.body.dataset.received ?? 0) + 1;
}

function showState(state, why) {
  document.body.dataset.call = state;
  $("call-state").textContent = {
    idle: "Not connected",
    waiting: "Waiting for the other side …",
    connected: "Connected",
    closed: "The call has ended",
  }[state];
  const isIdle = state === "idle" || state === "closed";
  $("call-error").textContent = why;
  $("hang-up").hidden = isIdle;
  $("hang-up").textContent = state === "waiting" ? "Cancel" : "Hang up";
  $("find-tab").disabled = state === "waiting";
  $("connect").hidden = state === "connected";
  if (isIdle) $("mine").value = $("theirs").value = ""; // of use for one call alone
  if (state === "connected") sendFace();
  else {
    other.clearRect(0, 0, other.canvas.width, other.canvas.height);
    showEmoji($("other-emoji"), undefined);
    $("other-note").textContent = "The other side appears here";
  }
}

async function showTraffic() {
  const now = performance.now() / 1000;
  const totals = await call.statistics();
  const seconds = now - counted.time;
  const live = document.body.dataset.call === "connected";
  const kilobits = (key) => Math.max(0, ((totals[key] - (counted[key] ?? 0)) * 8) / seconds / 1000);
  const told = (rate) => (live && Number.isFinite(rate) ? rate.toFixed(1) : "–"); // some browsers do not count
  const perSecond = (key) => Math.max(0, (totals[key] - (counted[key] ?? 0)) / seconds);
  $("kbits-points").textContent = told(kilobits("bytesOut"));
  $("kbits-wire").textContent = told(kilobits("wireOut"));
  $("frames-out").textContent = live ? perSecond("framesOut").toFixed(0) : "–";
  $("frames-in").textContent = live ? perSecond("framesIn").toFixed(0) : "–";
  counted = { ...totals, time: now };
}

// buttons and keys

function wire() {
  const choose = () => $("file").click();
  document.querySelectorAll("[data-do]").forEach((button) => {
    button.onclick = {
      camera: () => start(openCamera),
      file: choose,
      sample: () => start(() => openPicture(SAMPLE)),
      stop: () => stop(),
      fullscreen: toggleFullScreen,
    }[button.dataset.do];
  });
  $("file").onchange = ({ target }) => {
    const [file] = target.files;
    if (file) start(() => openFile(file));
    target.value = "";
  };
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    const file = event.dataTransfer.files[0];
    if (file) start(() => openFile(file));
  });
  document.addEventListener("paste", (event) => {
    const file = event.clipboardData.files[0];
    if (file) start(() => openFile(file));
  });
  for (const key of Object.keys(shown)) {
    const box = $(`show-${key}`);
    box.checked = shown[key];
    box.onchange = () => {
      shown[key] = box.checked;
      render();
    };
  }
  const tabs = [...document.querySelectorAll("[role=tab]")];
  tabs.forEach((tab, place) => {
    tab.onclick = () => {
      history.pushState(null, "", `#${tab.dataset.tab}`); // to set location.hash would take the focus away
      showTab();
    };
    tab.onkeydown = ({ key }) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[key];
      if (!step) return;
      const next = tabs.at((place + step) % tabs.length);
      next.focus();
      next.click();
    };
  });
  // Phones show a video in full, but no other element.
  document.querySelector("[data-do=fullscreen]").hidden = !document.fullscreenEnabled;
  addEventListener("hashchange", showTab);
  showTab();
  $("find-tab").onclick = () => attempt(call.findTab);
  $("create-invitation").onclick = () => attempt(async () => ($("mine").value = await call.invite()));
  $("use-theirs").onclick = () =>
    attempt(async () => {
      const text = $("theirs").value;
      if (document.body.dataset.call === "waiting" && $("mine").value && isReply(text)) await call.complete(text);
      else $("mine").value = await call.accept(text);
    });
  $("copy").onclick = async () => {
    $("mine").select();
    await navigator.clipboard?.writeText($("mine").value).catch(() => {});
  };
  $("hang-up").onclick = () => call.hangUp();
  addEventListener("pagehide", () => call.hangUp());
  showFace(null);
  showSpeed(null);
}

async function attempt(work) {
  try {
    $("call-error").textContent = "";
    await work();
  } catch (error) {
    $("call-error").textContent = error.message;
  }
}

function isReply(text) {
  try {
    return JSON.parse(atob(text.trim())).type === "answer";
  } catch {
    return false;
  }
}

function showTab() {
  const chosen = location.hash === "#call" ? "call" : "mirror";
  for (const tab of document.querySelectorAll("[role=tab]")) {
    const isChosen = tab.dataset.tab === chosen;
    tab.setAttribute("aria-selected", isChosen);
    tab.tabIndex = isChosen ? 0 : -1; // the arrow keys go from one to the other
    $(tab.dataset.tab).hidden = !isChosen;
  }
  render();
}

function toggleFullScreen() {
  if (document.fullscreenElement) document.exitFullscreen();
  else $("frame").requestFullscreen();
}

// without a network

/** Let the service worker keep what was loaded, and what may be chosen later. */
async function keepOffline(index) {
  if (!("serviceWorker" in navigator) || !import.meta.env.PROD) return;
  let active;
  try {
    await navigator.serviceWorker.register(`${BASE}sw.js`);
    ({ active } = await navigator.serviceWorker.ready);
    await import("./tfjs.js");
  } catch (error) {
    console.warn("Without a network the page will not be there:", error); // with one, all works
    document.body.dataset.offline = "no";
    return;
  }
  const loaded = performance.getEntriesByType("resource").map(({ name }) => name);
  const models = index.flatMap((entry) => entry.files.map((file) => `${BASE}models/${file}`));
  const others = ["vendor/tfjs/tfjs-backend-wasm-simd.wasm", "sample.jpg", "manifest.webmanifest", ""];
  const all = [...loaded, ...models, ...others.map((path) => BASE + path)];
  const { port1, port2 } = new MessageChannel();
  port1.onmessage = ({ data: missing }) => {
    document.body.dataset.offline = missing.length ? "partly" : "true";
    if (missing.length) say(`Without a network these files will be missing: ${missing.join(", ")}`, true);
  };
  active.postMessage([...new Set(all)].filter((url) => url.startsWith(BASE)), [port2]);
}

globalThis.grimace = { faces: () => last.tracks, traffic: call.statistics }; // for tests, and for who wants to look
main();
