"""Stage `export`: turn a task's candidate into bundles for TFLite, TF.js and TensorRT.

Quantisation takes its ranges from training faces, cropped as in deployment and of all classes
alike. Which recipe it follows, and which layers it leaves in float, validation decides, as it does
every choice: the test side is for `verify`. What each bundle carries besides graphs is told in
`pipelines.bundles`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import bundles, tracking
from pipelines.bundles import card, golden, sbom
from pipelines.cli import run, whole_folder
from pipelines.exporters import tensorrt, tfjs, tflite
from pipelines.exporters.quantisation import Calibration
from pipelines.heldout import Faces, faces_of_side
from pipelines.measures import landmark_errors
from pipelines.params import Export, Params, TaskName, load_params
from pipelines.runtimes import load
from pipelines.shards import read_meta


def main() -> None:
    """Write deploy/TASK."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", required=True, choices=("emotion", "landmarks"))
    task, params = parser.parse_args().task, load_params()
    model, meta = Path("deploy/candidate", f"{task}.keras"), read_meta(Path("data/augment", task))
    images = golden.draw(params.tasks.named(task), task)
    with load(model) as reference:
        answers = reference.predict(images)
        calibration = calibrate(task, params, reference.predict)
    source = origin(task, model, meta["dataset"])
    with whole_folder(Path("deploy", task)) as out:
        for target, variants in convert(model, out, calibration, params.export).items():
            bundle = out / target
            manifest = bundles.describe(target, variants, meta, source)
            manifest["licence"] = licence(meta["dataset"])
            sbom.write(bundle / manifest["sbom"], bundle, manifest)
            golden.write(bundle / manifest["golden"], images, answers)
            card.write(bundle / manifest["card"], manifest)
            files = bundles.seal(bundle, manifest)["files"]
            size = sum(file["bytes"] for file in files) / 2**20
            print(f"deploy/{task}/{target}: {len(files)} files, {size:.1f} MiB")
            tell_quantisation(variants)


def convert(
    model: Path, out: Path, calibration: Calibration, settings: Export
) -> dict[str, dict[str, dict[str, Any]]]:
    """Write `out/tflite`, `out/tfjs` and `out/tensorrt`; return the variants of each."""
    return {
        "tflite": tflite.export(model, out / "tflite", calibration),
        "tfjs": tfjs.export(model, out / "tfjs"),
        "tensorrt": tensorrt.export(model, out / "tensorrt", calibration, settings.engines),
    }


def calibrate(task: TaskName, params: Params, predict: Any) -> Calibration:
    """Gather the faces of a quantisation, and what it may cost.

    The bound is the share `export.aim` of what `verify` allows: validation is not the test, and
    what just passes on one may just fail on the other.

    Args:
        task: "emotion" or "landmarks".
        params: all of them.
        predict: the float32 model, images to answers.
    """
    settings, crop = params.export, params.tasks.named(task)
    # As they will come, not augmented: a brightness or a rotation that deployment hardly sees
    # widens the ranges, and int8 then spends its 256 steps on them.
    train = faces_of_side(task, crop, "train", limit=settings.calibration, balanced=True)
    trial = faces_of_side(task, crop, "val", limit=settings.trial)
    answers = predict(trial.images)
    emotion = task == "emotion"
    return Calibration(
        images=train.images.astype(np.float32),
        trial=trial.images.astype(np.float32),
        loss=(lambda outputs: points_lost(answers, outputs))
        if emotion
        else (lambda outputs: nme_risen(trial, answers, outputs)),
        bound=settings.aim * params.verify.budget(task, crop.dataset),
        unit="expected points of accuracy" if emotion else "of the float32 NME",
    )


def points_lost(exact: np.ndarray, outputs: np.ndarray) -> float:
    """Return what accuracy loses, in points, if the exact probabilities can be taken at their word.

    Where another class wins, the one that had won by `exact` loses its probability and the other
    one's is gained. Counting right answers instead would need ten times the faces for the same
    certainty: most of the few decisions that rounding turns were as good as even.

    Args:
        exact: float32 (n, 7), probabilities of the float32 model.
        outputs: float32 (n, 7), those of the quantised one.
    """
    outputs = outputs.reshape(exact.shape)
    chosen = np.take_along_axis(exact, outputs.argmax(1)[:, None], 1)[:, 0]
    return float(100 * np.mean(exact.max(1) - chosen))


def nme_risen(faces: Faces, exact: np.ndarray, outputs: np.ndarray) -> float:
    """Return by what fraction the inter-ocular NME of `outputs` exceeds that of `exact`."""
    before, after = (np.nanmean(landmark_errors(faces, each)[0]) for each in (exact, outputs))
    return float(after / before - 1)


def origin(task: TaskName, model: Path, dataset: str) -> dict[str, Any]:
    """Say where the weights come from: model, its training, data and code."""
    selected = json.loads(Path("reports/select", f"{task}.json").read_text())
    data = Path("data/augment", task)
    return {
        "model": selected["candidate"],
        "model_sha256": tracking.sha256(model),
        "mlflow": {"experiment": f"grimace-{task}", "tag": tracking.MODEL_TAG},
        "dataset": dataset,
        "data_version": tracking.data_version(data),
        "git_commit": tracking.provenance(data)["grimace.git_commit"],
        "validation": {"metric": selected["metric"], "value": selected["value"]},
    }


def licence(dataset: str) -> dict[str, str]:
    """Return the licence of the code, and what the dataset's card says of its own."""
    text = Path(__file__).with_name("datasets").joinpath(f"{dataset}.md").read_text()
    sections = {
        title.strip(): " ".join(body.split())
        for title, _, body in (part.partition("\n") for part in text.split("\n## "))
    }
    return {
        "code": "MIT",
        "training_data": sections["Licence"],
        "allowed_use": sections["Allowed use"],
    }


def tell_quantisation(variants: dict[str, dict[str, Any]]) -> None:
    """Print what the search for sensitive layers came to."""
    for name, facts in variants.items():
        if found := facts.get("quantisation"):
            print(
                f"  {name}: loses {found['loss']:.4f} {found['unit']} on validation, "
                f"{found['bound']:.4f} aimed at; {len(found['float_layers'])} of "
                f"{found['layers']} layers left in float"
            )


if __name__ == "__main__":
    run(main)
