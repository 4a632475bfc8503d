"""Stage `export`: turn a task's candidate into bundles for TFLite, TF.js and TensorRT.

Each bundle carries a manifest: what the files are and their SHA-256, what goes in and comes out,
and how a face becomes an input. Quantisation is calibrated on training faces only, cropped as in
deployment.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from models.schemes import SCHEMES
from pipelines import tracking
from pipelines.cli import run, whole_folder
from pipelines.evaluate import faces_of_side
from pipelines.exporters import tensorrt, tfjs, tflite
from pipelines.params import load_params
from pipelines.shards import read_meta

TARGETS = {"tflite": tflite.export, "tfjs": tfjs.export, "tensorrt": tensorrt.export}


def main() -> None:
    """Write deploy/TASK."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", required=True, choices=("emotion", "landmarks"))
    task = parser.parse_args().task
    params = load_params()
    settings = params.export
    model, shards = Path("deploy/candidate", f"{task}.keras"), Path("data/augment", task)
    # As they will come, not augmented: a brightness or a rotation that deployment hardly sees
    # widens the ranges, and int8 then spends its 256 steps on them.
    faces = faces_of_side(task, params.tasks.named(task), "train", limit=settings.calibration)
    calibration = faces.images.astype(np.float32)

    with whole_folder(Path("deploy", task)) as out:
        for target, export in TARGETS.items():
            bundle = out / target
            bundle.mkdir()
            if target == "tensorrt":
                tensorrt.export(model, bundle, calibration, settings.engines)
            else:
                export(model, bundle, calibration)
            manifest = describe(bundle, target, read_meta(shards), tracking.sha256(model))
            (bundle / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
            size = sum(file["bytes"] for file in manifest["files"]) / 2**20
            print(f"deploy/{task}/{target}: {len(manifest['files'])} files, {size:.1f} MiB")


def describe(bundle: Path, target: str, meta: dict[str, Any], model_sha256: str) -> dict[str, Any]:
    """Return a bundle's manifest: all that an application must know to use it."""
    size, channels = meta["size"], meta["channels"]
    files = [
        {
            "path": path.relative_to(bundle).as_posix(),
            "bytes": path.stat().st_size,
            "sha256": tracking.sha256(path),
        }
        for path in sorted(bundle.rglob("*"))
        if path.is_file()
    ]
    output: dict[str, Any] = (
        {"shape": [7], "meaning": "probabilities", "labels": list(meta["classes"])}
        if meta["task"] == "emotion"
        else {
            "shape": [meta["points"], 2],
            "meaning": "x, y in [0, 1] of the crop, x to the right, y down",
            "scheme": meta["scheme"],
            "mirror": list(SCHEMES[meta["points"]].mirror),
        }
    )
    return {
        "schema": 1,
        "task": meta["task"],
        "target": target,
        "files": files,
        "input": {
            "shape": [size, size, channels],
            "layout": "height, width, channels",
            "dtype": "float32",
            "range": [0, 255],
            "colour": "grey, ITU-R 601 luma" if channels == 1 else "RGB",
            "crop": {
                "shape": "square around the face box, edge pixels repeated beyond the image",
                "margin": meta["margin"],
                "margin_unit": "of the longer side of the face box, on every side",
            },
        },
        "output": {"dtype": "float32", **output},
        "source": {"model_sha256": model_sha256, "dataset": meta["dataset"]},
    }


if __name__ == "__main__":
    run(main)
