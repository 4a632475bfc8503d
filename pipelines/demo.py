"""Show the models at work: faces become emoji, with box, label and landmarks.

    python -m pipelines.demo --camera 0
    python -m pipelines.demo --folder pictures/                  # in an endless loop
    python -m pipelines.demo --video talk.mp4 --out swapped.mp4  # without a window

Keys: h help, f full screen, e emoji, l landmarks, b box, 1–4 the detector, Esc ends.
It runs from TFLite files alone: `uv run --only-group runtime python -m pipelines.demo …` installs
no TensorFlow. Emoji: drawn for Grimace, MIT.
"""

import argparse
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, count, repeat
from pathlib import Path
from time import monotonic, perf_counter

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from pipelines import overlay
from pipelines.cli import GrimaceError, is_disk_full, run
from pipelines.crops import UnreadableImageError, decode
from pipelines.detectors import DETECTORS, find_faces
from pipelines.lite import Model, open_models
from pipelines.smoothing import Seen, tracker

LONGEST = 2048  # pixels of a picture's longer side; larger ones are made smaller first
MOST_PIXELS = 300_000_000  # of a file, before it is decoded
MOST_FACES = 10
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
HELP = "h help   f full screen   e emoji   l landmarks   b box   1-4 detector   Esc end"


@dataclass
class Options:
    """What is shown, changed by keys.

    `changed` asks `swap` for the same still picture again.
    """

    detector: str = "blazeface"
    emoji: bool = True
    landmarks: bool = False
    box: bool = False
    help: bool = False
    changed: bool = False


@dataclass(frozen=True)
class Frame:
    """One picture to work on.

    Attributes:
        rgb: uint8 (H, W, 3).
        time: in seconds, of a video or camera; None for a still picture.
        name: of its file, "" for video and camera.
    """

    rgb: np.ndarray
    time: float | None = None
    name: str = ""


@dataclass
class Tally:
    """What was done: frames and faces in all, milliseconds of each of the last ten thousand."""

    milliseconds: deque[float] = field(default_factory=partial(deque, maxlen=10_000))
    frames: int = 0
    faces: int = 0

    def __str__(self) -> str:
        if not self.milliseconds:
            return "no picture"
        p50, p95 = np.percentile(self.milliseconds, (50, 95))
        return (
            f"{self.frames} pictures, {self.faces} faces, {p50:.1f} ms a picture (p95 {p95:.1f} ms)"
        )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def main() -> None:
    """Read the command line; show, or write where there is --out."""
    arguments = _parser().parse_args()
    _spare_the_source(arguments)
    cv2.setNumThreads(1)
    models = open_models(arguments.model, threads=arguments.threads)
    show = set(arguments.show)
    options = Options(arguments.detector, "emoji" in show, "landmarks" in show, "box" in show)
    with _frames(arguments) as frames:
        swapped = swap(frames, models, options, tally := Tally())
        if arguments.out:
            _write(swapped, arguments)
        else:
            from pipelines.window import show_frames

            show_frames(swapped, lambda key: press(key, options), arguments.pause)
    print(tally, file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--image", type=Path, metavar="FILE")
    source.add_argument("--folder", type=Path, metavar="DIR", help="its pictures, again and again")
    source.add_argument("--camera", type=int, metavar="N", help="0 is the first")
    source.add_argument("--video", type=Path, metavar="FILE")
    parser.add_argument(
        "--out",
        type=Path,
        help="no window: write a picture, a folder of .png pictures (once through), or an .mp4",
    )
    parser.add_argument("--frames", type=_positive, metavar="N", help="end after so many")
    parser.add_argument(
        "--model",
        nargs="+",
        default=[],
        metavar="MODEL",
        help="a precision of the models in web/public/models (int8), or .tflite files with their "
        "manifest.json",
    )
    parser.add_argument("--detector", choices=DETECTORS, default="blazeface")
    parser.add_argument(
        "--show", nargs="+", choices=("emoji", "landmarks", "box"), default=["emoji"]
    )
    parser.add_argument("--threads", type=_positive, default=1, help="for each model; default 1")
    parser.add_argument("--pause", type=float, default=3.0, help="seconds a picture of a folder")
    return parser


def _spare_the_source(arguments: argparse.Namespace) -> None:
    source = arguments.image or arguments.folder or arguments.video
    out = arguments.out
    if source and out and source.exists() and out.exists() and out.samefile(source):
        raise GrimaceError(f"--out {out} is what is read, and would be overwritten; name another")


# Frames


@contextmanager
def _frames(arguments: argparse.Namespace) -> Iterator[Iterator[Frame]]:
    """Open the source; what it holds is let go at the end."""
    capture: cv2.VideoCapture | None = None
    if arguments.image:
        picture = read_picture(arguments.image)
        frames = iter([picture]) if arguments.out else repeat(picture)  # keys change its look
    elif arguments.folder:
        frames = pictures_of(arguments.folder, once=arguments.out is not None)
    else:
        capture = _capture(arguments.camera, arguments.video)
        frames = _captured(capture, live=arguments.camera is not None)
    try:
        yield (frame for frame, _ in zip(frames, _up_to(arguments.frames), strict=False))
    finally:
        if capture:
            capture.release()


def _up_to(frames: int | None) -> Iterator[int]:
    return iter(range(frames)) if frames is not None else count()


def read_picture(path: Path) -> Frame:
    """Read a picture of any common format: upright, in RGB, its first frame if it is animated.

    Raises:
        GrimaceError: it is not there, damaged, or too large.
    """
    try:
        encoded = path.read_bytes()
    except OSError as error:
        raise GrimaceError(f"{path} cannot be read: {error.strerror or error}") from error
    # Pillow's own bound is below the 100 megapixels that cameras give today.
    Image.MAX_IMAGE_PIXELS = MOST_PIXELS // 2
    try:
        rgb = decode(encoded, 3)
    except UnreadableImageError as error:
        raise GrimaceError(f"{path} cannot be read as a picture: {error}") from error
    return Frame(_fitted(rgb), name=path.name)


def _fitted(rgb: np.ndarray) -> np.ndarray:
    height, width = rgb.shape[:2]
    scale = LONGEST / max(height, width)
    if scale >= 1:
        return rgb
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)


def pictures_of(folder: Path, once: bool) -> Iterator[Frame]:
    """Yield a folder's pictures by name, once or without end; say which ones cannot be read.

    Raises:
        GrimaceError: it is no folder, or not one picture in it can be read.
    """
    if not folder.is_dir():
        raise GrimaceError(f"{folder} is not a folder; for one picture use --image")
    bad: set[Path] = set()
    while True:
        try:
            paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES)
        except OSError as error:
            raise GrimaceError(f"{folder} cannot be read: {error.strerror or error}") from None
        read = 0
        for path in paths:
            if path in bad:
                continue
            try:
                frame = read_picture(path)
            except GrimaceError as error:
                print(f"left out: {error}", file=sys.stderr)
                bad.add(path)
                continue
            read += 1
            yield frame
        if not read:
            raise GrimaceError(f"{folder} holds no picture that can be read")
        if once:
            return


def _capture(camera: int | None, video: Path | None) -> cv2.VideoCapture:
    if video is not None and not video.is_file():
        raise GrimaceError(f"{video} does not exist")
    # What goes wrong is said below.
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    capture = cv2.VideoCapture(camera) if camera is not None else cv2.VideoCapture(str(video))
    if capture.isOpened():
        return capture
    capture.release()
    raise GrimaceError(
        f"camera {camera} does not open: none is connected, another program has it, or you may "
        "not read it (on Linux, the group video); --camera takes another number"
        if camera is not None
        else f"{video} does not open: it is damaged, or in a format that this OpenCV cannot read"
    )


def _captured(capture: cv2.VideoCapture, live: bool) -> Iterator[Frame]:
    rate = frame_rate(capture)
    start = monotonic()
    for number in count():
        good, bgr = capture.read()
        if not good:
            if number == 0:
                raise GrimaceError("no picture came: the video or the camera's signal is damaged")
            if live:
                raise GrimaceError("the camera is gone: look at its plug, then start again")
            return
        time = monotonic() - start if live else number / rate
        rgb = _fitted(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB))
        yield Frame(rgb[:, ::-1].copy() if live else rgb, time)  # a camera is a mirror


def frame_rate(capture: cv2.VideoCapture) -> float:
    """Frames a second, 30 where the source does not say."""
    rate = capture.get(cv2.CAP_PROP_FPS)
    return rate if 1 <= rate <= 240 else 30.0


# Faces


def swap(
    frames: Iterator[Frame], models: dict[str, Model], options: Options, tally: Tally
) -> Iterator[Frame]:
    """Yield the frames with their faces drawn over.

    Options may change in between: a still picture comes again then, a video goes on.
    """
    follow = tracker()
    labels = models["emotion"].labels if "emotion" in models else ()
    for frame in frames:
        while True:
            options.changed = False
            start = perf_counter()
            faces = analyse(frame, models, options.detector)
            tally.faces += len(faces)
            faces = tracker()(faces, 0.0) if frame.time is None else follow(faces, frame.time)
            picture = drawn(frame.rgb, faces, labels, options)
            tally.frames += 1
            tally.milliseconds.append((perf_counter() - start) * 1e3)
            yield Frame(picture, frame.time, frame.name)
            if frame.time is not None or not options.changed:
                break


def analyse(frame: Frame, models: dict[str, Model], detector: str) -> list[Seen]:
    """Find a frame's faces, at most ten, and run the models on each."""
    faces = []
    for face in find_faces(frame.rgb, detector, frame.time is None)[:MOST_FACES]:
        answers = {task: model.answer(frame.rgb, face.box) for task, model in models.items()}
        points, probabilities = answers.get("landmarks"), answers.get("emotion")
        faces.append(Seen(face.box, face.eyes, points, probabilities))
    return faces


def drawn(
    rgb: np.ndarray, faces: list[Seen], labels: tuple[str, ...], options: Options
) -> np.ndarray:
    """Return the picture with what `options` asks for drawn over each face."""
    picture = rgb.copy()
    for face in faces:
        known = face.label is not None and face.probabilities is not None
        if options.emoji and known:
            overlay.draw_emoji(picture, labels[face.label], face.box, face.eyes)  # type: ignore[index]
        if options.landmarks and face.points is not None:
            overlay.draw_points(picture, face.points, face.box)
        if options.box:
            text = f"{labels[face.label]} {face.probabilities[face.label]:.0%}" if known else ""  # type: ignore[index]
            overlay.draw_box(picture, face.box, text)
    if options.help:
        overlay.write(picture, HELP, (8, picture.shape[0] - 8), picture.shape[1] / 1100)
    elif not faces:
        overlay.write(picture, "no face", (8, picture.shape[0] - 8))
    return picture


def press(key: str, options: Options) -> bool:
    """Change the options as a key says; whether it meant anything."""
    switches = {"e": "emoji", "l": "landmarks", "b": "box", "h": "help"}
    if key in switches:
        setattr(options, switches[key], not getattr(options, switches[key]))
    elif key in ("1", "2", "3", "4"):
        options.detector = list(DETECTORS)[int(key) - 1]
    else:
        return False
    options.changed = True
    return True


# Out


def _write(frames: Iterator[Frame], arguments: argparse.Namespace) -> None:
    out: Path = arguments.out
    if arguments.image:
        save(next(frames), out)
    elif arguments.folder:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise GrimaceError(
                f"{out} cannot be made a folder for the pictures: {error.strerror or error}"
            ) from None
        taken: set[str] = set()
        for frame in _progress(frames):
            name = free_name(frame.name, taken)
            save(frame, out / name)
            taken.add(name)
    else:
        rate = 30.0
        if arguments.video:
            capture = _capture(None, arguments.video)
            rate = frame_rate(capture)
            capture.release()
        write_video(_progress(frames), out, rate)
    print(f"{out} written", file=sys.stderr)


def _progress(frames: Iterator[Frame]) -> Iterator[Frame]:
    return iter(tqdm(frames, "swapping", unit="frame", delay=2, disable=None))


def free_name(name: str, taken: set[str]) -> str:
    """Return the .png that a picture is written to: `a.png`, or `a-2.png` where that is taken."""
    stem = Path(name).stem
    names = chain((f"{stem}.png",), (f"{stem}-{number}.png" for number in count(2)))
    return next(name for name in names if name not in taken)


def save(frame: Frame, out: Path) -> None:
    """Write a picture in the format that the name's ending asks for.

    Raises:
        GrimaceError: no format has that ending, or the place cannot be written.
    """
    try:
        Image.fromarray(frame.rgb).save(out)
    except ValueError as error:
        raise GrimaceError(
            f"{out} cannot be written: {error}; try a name ending in .png"
        ) from error
    except OSError as error:
        if is_disk_full(error):
            raise  # for which there is an advice already
        raise GrimaceError(f"{out} cannot be written: {error.strerror or error}") from error


def write_video(frames: Iterator[Frame], out: Path, rate: float) -> None:
    """Write an .mp4; ended by Ctrl-C it holds what came so far.

    Frames are repeated or left out so that each stands where its time says: what a camera sees is
    seldom worked on at 30 frames a second.

    Raises:
        GrimaceError: the place or the ending is not to be written.
    """
    writer, written = None, 0
    try:
        for frame in frames:
            height, width = frame.rgb.shape[:2]
            # The codec takes even sizes alone.
            size = (width - width % 2 or 2, height - height % 2 or 2)
            if writer is None:
                codec = cv2.VideoWriter.fourcc(*"mp4v")
                writer = cv2.VideoWriter(str(out), codec, rate, size)
                if not writer.isOpened():
                    raise GrimaceError(f"{out} cannot be written; try a name ending in .mp4")
            bgr = cv2.cvtColor(frame.rgb[: size[1], : size[0]], cv2.COLOR_RGB2BGR)
            due = written + 1 if frame.time is None else round(frame.time * rate) + 1
            for _ in range(written, due):
                writer.write(bgr)
            written = max(written, due)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    finally:
        if writer is not None:
            writer.release()


if __name__ == "__main__":
    run(main)
