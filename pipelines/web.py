"""Put a task's bundles where the page and the demo find them: `web/public/models`.

    python -m pipelines.web                            # all of deploy/
    python -m pipelines.web --precisions int8 uint8    # the small ones alone
    python -m pipelines.web --precisions int8 uint8 tflite/float16

TFLite files are for LiteRT, in the browser and in `python -m pipelines.demo`; TF.js folders are
for TF.js. `index.json` lists them for the page. Bundles are taken as they were signed: for those of
another checkout name its public key in GRIMACE_VERIFY_KEY (see `pipelines.bundles.signatures`).
"""

import argparse
import json
from pathlib import Path
from shutil import copyfile
from typing import Any

from pipelines import bundles
from pipelines.cli import GrimaceError, run, whole_folder
from pipelines.lite import MODELS

RUNTIMES = {"tflite": "litert", "tfjs": "tfjs"}
LARGEST = 5 * 2**20  # bytes, of the files of one precision
PREFERRED = ("int8", "uint8", "float16", "float32")  # the first is what page and demo start with


def main() -> None:
    """Copy the bundles and write the index."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.web",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--deploy", type=Path, default=Path("deploy"), help="folder of bundles")
    parser.add_argument("--out", type=Path, default=MODELS, help="folder of models to replace")
    parser.add_argument(
        "--precisions",
        nargs="+",
        metavar="NAME",
        help="copy these alone, of both bundles or of tflite/ or tfjs/",
    )
    arguments = parser.parse_args()
    entries = publish(arguments.deploy, arguments.out, arguments.precisions)
    for entry in entries:
        print(f"{arguments.out / entry['path']}: {entry['bytes'] / 2**20:.2f} MiB")


def publish(deploy: Path, out: Path, precisions: list[str] | None = None) -> list[dict[str, Any]]:
    """Copy the TFLite and TF.js bundles of a `deploy` folder, each as it was signed, and list them.

    Args:
        deploy: a folder as `export` writes it: TASK/{tflite,tfjs} with a manifest each.
        out: the folder to write, whole or not at all; what this wrote there before is replaced.
        precisions: names to copy, of every bundle ("int8") or of one ("tflite/float16"); by
            default all.

    Returns:
        What `index.json` lists under "models": for each precision of each bundle its task,
        runtime, precision, path (the file to open, relative to `out`), files, bytes, and the
        manifest's input, output and source.

    Raises:
        GrimaceError: no bundles are there, one is not signed by a trusted key, a file is not what
            its manifest says, a precision is too large for a page, or `out` holds something else.
    """
    if out.exists() and not (out / "index.json").is_file() and any(out.iterdir()):
        raise GrimaceError(
            f"{out} holds something that is not from here (it has no index.json), and would be "
            "replaced; name an empty or a new folder with --out"
        )
    entries = []
    with whole_folder(out) as folder:
        for manifest_path in sorted(deploy.glob("*/*/manifest.json")):
            if manifest_path.parent.name in RUNTIMES:
                entries += _copy(manifest_path.parent, folder, precisions)
        if not entries:
            raise GrimaceError(
                f"{deploy} holds no TFLite or TF.js bundle"
                + (f" of precision {', '.join(precisions)}" if precisions else "")
                + "; run `uv run dvc repro`, or name another folder with --deploy"
            )
        entries.sort(key=lambda entry: (entry["task"], entry["runtime"], _rank(entry["precision"])))
        (folder / "index.json").write_text(json.dumps({"models": entries}, indent=1) + "\n")
    return entries


def _rank(precision: str) -> int:
    return PREFERRED.index(precision) if precision in PREFERRED else len(PREFERRED)


def _copy(bundle: Path, out: Path, precisions: list[str] | None) -> list[dict[str, Any]]:
    manifest = bundles.read(bundle)
    bundles.check_files(bundle, manifest)
    place = Path(manifest["task"], bundle.name)
    listed = sorted(file["path"] for file in manifest["files"])
    entries = []
    for main in listed:
        if not main.endswith((".tflite", "model.json")):
            continue
        # float32.tflite, or float32/model.json with its shards
        precision = Path(main).parts[0].removesuffix(".tflite")
        if precisions and not {precision, f"{bundle.name}/{precision}"} & {*precisions}:
            continue
        files = [path for path in listed if Path(path).parts[0] in (main, precision)]
        size = sum((bundle / path).stat().st_size for path in files)
        if size > LARGEST:
            raise GrimaceError(
                f"{bundle / main} has {size / 2**20:.1f} MiB, more than the {LARGEST / 2**20:.0f} "
                "that a page may load; leave it out with --precisions"
            )
        for path in files:
            (out / place / path).parent.mkdir(parents=True, exist_ok=True)
            copyfile(bundle / path, out / place / path)
        entry = {
            "task": manifest["task"],
            "runtime": RUNTIMES[bundle.name],
            "precision": precision,
            "path": (place / main).as_posix(),
            "files": [(place / path).as_posix() for path in files],
            "bytes": size,
        }
        told = {key: manifest[key] for key in ("input", "output", "source")}
        entries.append({**entry, **told})
    return entries


if __name__ == "__main__":
    run(main)
