// Where pictures come from: the camera, a picture, a video. All end in a message or in a source
// {kind, note, still, mirrored, width, height, draw(context, width, height), next(callback), stop()};
// what moves has `lost` too, a promise of the message for when it ends against one's will.

const LONGEST = 2048; // pixels a picture is worked on with; a video with 960
const LONGEST_VIDEO = 960;

/** What went wrong, in words for the person at the screen. */
export class SourceError extends Error {}

/** Ask for the camera. */
export async function openCamera() {
  if (!navigator.mediaDevices?.getUserMedia) {
    throw new SourceError("The camera works on https:// and localhost addresses only. Pictures and videos work here.");
  }
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({
      audio: false,
      video: { facingMode: "user", width: { ideal: 640 }, height: { ideal: 480 }, frameRate: { ideal: 30 } },
    });
  } catch (error) {
    throw new SourceError(CAMERA_ERRORS[error.name] ?? `The camera did not start: ${error.message}`);
  }
  const [track] = stream.getVideoTracks();
  const lost = new Promise((resolve) => (track.onended = () => resolve(CAMERA_LOST)));
  const gone = lost.then((message) => {
    throw new Error(message);
  });
  let video;
  try {
    video = await Promise.race([play((element) => (element.srcObject = stream)), gone]);
  } catch (error) {
    track.stop();
    throw new SourceError(`The camera gives no picture: ${error.message}`);
  }
  return {
    ...sourceOf(video, "camera", LONGEST_VIDEO),
    lost,
    mirrored: true,
    stop() {
      track.stop();
      video.srcObject = null;
    },
  };
}

const CAMERA_LOST = "The camera was unplugged or taken away. Start it again, or open a picture or a video.";

const CAMERA_ERRORS = {
  NotFoundError: "No camera was found. Plug one in, or open a picture or a video.",
  NotAllowedError: "The camera was not allowed. Allow it in the browser's address bar, or open a picture or a video.",
  NotReadableError: "The camera is in use by another program. Close that program and try again.",
  OverconstrainedError: "The camera offers no size that fits. Open a picture or a video instead.",
};

/** Open a picture or a video that was chosen, dropped or pasted. */
export async function openFile(file) {
  if (file.size === 0) throw new SourceError(`${file.name} is empty.`);
  const url = URL.createObjectURL(file);
  const isVideo = file.type.startsWith("video/");
  try {
    const source = isVideo ? await openVideo(url) : await openPicture(url);
    if (!source.still) return source;
    if (await isAnimated(file)) source.note = "Animated: the first frame is shown.";
    if (await isCut(file)) source.note = `${file.name} is cut off: part of the picture is missing.`;
    return source;
  } catch {
    URL.revokeObjectURL(url);
    throw new SourceError(`${file.name} cannot be read: it is damaged, or in a format this browser does not know.`);
  } finally {
    if (!isVideo) URL.revokeObjectURL(url);
  }
}

/** A picture at an address; turned upright and, if it is huge, made smaller. */
export async function openPicture(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  const { width, height } = fitted(image.naturalWidth, image.naturalHeight, LONGEST);
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.fillStyle = "white"; // behind what is transparent
  context.fillRect(0, 0, width, height);
  context.drawImage(image, 0, 0, width, height);
  const isSmaller = image.naturalWidth > width;
  image.src = ""; // the full-size pixels are not needed any more
  let frame = 0;
  return {
    kind: "picture",
    still: true,
    mirrored: false,
    note: isSmaller ? "A very large picture: worked on at a smaller size." : "",
    width,
    height,
    draw: (target, w, h) => target.drawImage(canvas, 0, 0, w, h),
    next: (callback) => (frame = requestAnimationFrame((now) => callback(now / 1000))),
    stop: () => cancelAnimationFrame(frame),
  };
}

async function openVideo(url) {
  const video = await play((element) => Object.assign(element, { src: url, loop: true }));
  return {
    ...sourceOf(video, "video", LONGEST_VIDEO),
    lost: new Promise((resolve) => (video.onerror = () => resolve("The video is damaged from here on."))),
    stop() {
      video.onerror = null;
      video.pause();
      URL.revokeObjectURL(url);
      video.removeAttribute("src");
      video.load();
    },
  };
}

async function play(attach) {
  const video = Object.assign(document.createElement("video"), { muted: true, playsInline: true });
  attach(video);
  await new Promise((resolve, reject) => {
    video.onloadeddata = resolve;
    video.onerror = () => reject(video.error);
  });
  await video.play();
  if (!video.videoWidth) throw new Error("no picture in it");
  return video;
}

function sourceOf(video, kind, longest) {
  return {
    kind,
    note: "",
    still: false,
    mirrored: false,
    ...fitted(video.videoWidth, video.videoHeight, longest),
    /** Take over another size, as a phone's camera has it when the phone is turned. */
    resized() {
      const size = fitted(video.videoWidth, video.videoHeight, longest);
      const changed = size.width !== this.width || size.height !== this.height;
      Object.assign(this, size);
      return changed;
    },
    draw: (target, w, h) => target.drawImage(video, 0, 0, w, h),
    next(callback) {
      const tell = (now) => callback(now / 1000);
      if (video.requestVideoFrameCallback) video.requestVideoFrameCallback(tell);
      else requestAnimationFrame(tell);
    },
  };
}

function fitted(width, height, longest) {
  const scale = Math.min(1, longest / Math.max(width, height));
  return { width: Math.max(1, Math.round(width * scale)), height: Math.max(1, Math.round(height * scale)) };
}

async function isAnimated(file) {
  if (!globalThis.ImageDecoder || !(await ImageDecoder.isTypeSupported(file.type))) return false;
  const decoder = new ImageDecoder({ data: file.stream(), type: file.type });
  try {
    await Promise.all([decoder.tracks.ready, decoder.completed]);
    return decoder.tracks.selectedTrack.frameCount > 1;
  } catch {
    return false;
  } finally {
    decoder.close();
  }
}

/** Whether a picture lacks its end: browsers show what there is of it and say nothing. */
async function isCut(file) {
  const hasEnd = { "image/png": pngHasEnd, "image/jpeg": jpegHasEnd }[file.type];
  return hasEnd ? !hasEnd(new Uint8Array(await file.arrayBuffer())) : false;
}

/**
 * Whether a PNG's chunks come to the one that ends it; what cameras append behind does not matter.
 *
 * @param {Uint8Array} bytes
 */
export function pngHasEnd(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  // Each chunk: its length, its name, its data and a checksum.
  for (let at = 8; at + 12 <= bytes.length; at += view.getUint32(at) + 12) {
    if (view.getUint32(at + 4) === 0x49454e44) return true; // IEND
  }
  return false;
}

/**
 * Whether a JPEG's segments come to its end marker: not that of the small picture within its
 * metadata, nor what may look like one in a film behind it.
 *
 * @param {Uint8Array} bytes
 */
export function jpegHasEnd(bytes) {
  let at = 2;
  while (at + 1 < bytes.length) {
    const marker = bytes[at + 1];
    if (bytes[at] !== 0xff || marker === 0xff) at += 1; // coded pixels, or padding
    else if (marker === 0xd9) return true;
    else if (marker <= 0x01 || (marker >= 0xd0 && marker <= 0xd8)) at += 2; // in pixels: 255, a restart
    else at += 2 + ((bytes[at + 2] << 8) | bytes[at + 3]); // a segment with its length
  }
  return false;
}
