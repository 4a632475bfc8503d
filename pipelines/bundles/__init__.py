"""What is handed out: graphs in one format, with all that is needed to use and trust them.

    deploy/TASK/FORMAT/
        float32.tflite …      the graphs; a TF.js graph is a folder
        manifest.json         what there is and how to use it, see `describe`
        manifest.sig          a signature of that file's bytes, see `signatures`
        golden.json           images and what the trained model answers, see `golden`
        sbom.cdx.json         CycloneDX: what the graphs are made of and with, and what runs them
        README.md             a card for people

The manifest lists every other file but the signature with its size and SHA-256, so that the
signature covers the whole folder.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from models.schemes import SCHEMES
from pipelines import tracking
from pipelines.bundles import signatures
from pipelines.cli import GrimaceError
from pipelines.crops import placing

SCHEMA = 3
MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"
# Largest mean difference of one golden image's answer from float32's, by task and precision: about
# half of what would be expected of a graph that gives the same answer to every face. Rounding to
# eight bits moves probabilities by a few thousandths and points by about one.
_EIGHT_BITS = ("uint8", "dynamic int8", "int8")
TOLERANCES = {
    "emotion": {"float32": 1e-4, "float16": 5e-3} | dict.fromkeys(_EIGHT_BITS, 0.05),
    "landmarks": {"float32": 1e-4, "float16": 1e-3} | dict.fromkeys(_EIGHT_BITS, 0.01),
}


def describe(
    target: str,
    variants: Mapping[str, dict[str, Any]],
    meta: dict[str, Any],
    source: dict[str, Any],
) -> dict[str, Any]:
    """Return a manifest without its list of files: all that an application must know.

    Args:
        target: "tflite", "tfjs" or "tensorrt".
        variants: by name what the exporter wrote: `file` (a TF.js folder's name), `precision`, and
            what else it has to say.
        meta: the shards' meta.json: task, size, channels, margin, dataset, and classes or points.
        source: where the weights come from.
    """
    size, channels = meta["size"], meta["channels"]
    output: dict[str, Any] = (
        {
            "shape": [7],
            "meaning": "probabilities",
            "range": [0, 1],
            "labels": list(meta["classes"]),
        }
        if meta["task"] == "emotion"
        else {
            "shape": [meta["points"], 2],
            "meaning": "x, y in [0, 1] of the crop, x to the right, y down",
            "range": None,  # a point may lie outside the crop
            "scheme": meta["scheme"],
            "mirror": list(SCHEMES[meta["points"]].mirror),
        }
    )
    colour = "grey, ITU-R 601 luma" if channels == 1 else "RGB"
    margin, up = placing(meta["dataset"], meta["margin"])
    return {
        "schema": SCHEMA,
        "task": meta["task"],
        "target": target,
        "variants": {
            name: {**facts, "tolerance": TOLERANCES[meta["task"]][facts["precision"]]}
            for name, facts in variants.items()
        },
        "input": {
            "name": "image",
            "shape": [size, size, channels],
            "layout": "height, width, channels",
            "dtype": "float32",
            "range": [0, 255],
            "colour": colour,
            "crop": {
                "shape": "square around the face box, edge pixels repeated beyond the image",
                "margin": margin,
                "margin_unit": "of the longer side of the face box, on every side",
                "up": up,
                "up_unit": "of the longer side of the face box, from its centre up to the crop's",
                "box": "of the visible landmarks from brows and jaw to chin, else the detector's",
            },
        },
        # In this order; what comes after, scaling among it, is inside the graph.
        "preprocessing": [
            {"step": "rotate", "by": "EXIF orientation"},
            {"step": "flatten", "transparent_on": "white"},
            {"step": "colour", "to": colour, "weights": [0.299, 0.587, 0.114]}
            if channels == 1
            else {"step": "colour", "to": colour},
            {
                "step": "crop",
                "shape": "square",
                "centre": "of the face box, raised by up times its longer side",
                "side": "longer side of the face box times (1 + 2 * margin)",
                "margin": margin,
                "up": up,
                "border": "replicate",
            },
            {"step": "resize", "to": [size, size], "shrink": "area", "enlarge": "bilinear"},
            {"step": "cast", "to": "float32", "scale": 1, "offset": 0},
        ],
        "output": {"name": "answer", "dtype": "float32", **output},
        "source": source,
        "golden": "golden.json",
        "card": "README.md",
        "sbom": "sbom.cdx.json",
    }


def seal(bundle: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest with the list of all that is there, and sign it; return it."""
    listed = [
        {
            "path": path.relative_to(bundle).as_posix(),
            "bytes": path.stat().st_size,
            "sha256": tracking.sha256(path),
        }
        for path in sorted(bundle.rglob("*"))
        if path.is_file() and path.name not in (MANIFEST, SIGNATURE)
    ]
    whole = {**manifest, "files": listed}
    (bundle / MANIFEST).write_text(json.dumps(whole, indent=2) + "\n")
    signatures.sign(bundle / MANIFEST, bundle / SIGNATURE)
    return whole


def read(bundle: Path) -> dict[str, Any]:
    """Return a bundle's manifest, once its signature has been checked.

    Raises:
        GrimaceError: the manifest is missing, damaged or of another schema, or its signature is
            missing, wrong or by a key that is not trusted.
    """
    path = bundle / MANIFEST
    if not path.is_file():
        raise GrimaceError(f"{path} is missing; export again")
    signatures.check(path, bundle / SIGNATURE)
    try:
        manifest = json.loads(path.read_bytes())
        found = manifest["schema"]
        for file in manifest["files"]:
            assert PurePosixPath(file["path"]).parts and file["sha256"]
        assert manifest["variants"] and manifest["source"]["model_sha256"]
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise GrimaceError(f"{path} is damaged ({error!r}); export again") from None
    if found != SCHEMA:
        raise GrimaceError(f"{path} has schema {found}, this code reads {SCHEMA}; export again")
    return manifest


def check_files(
    bundle: Path, manifest: dict[str, Any], concerned: Callable[[str], bool] = lambda _: True
) -> None:
    """Compare a bundle's files with its manifest.

    Args:
        bundle: the folder.
        manifest: what `read` gave.
        concerned: says of a name in the folder, of a file or a folder, whether to look at it.

    Raises:
        GrimaceError: a file is missing, of other bytes, or not listed.
    """
    listed = {
        file["path"]: file
        for file in manifest["files"]
        if concerned(PurePosixPath(file["path"]).parts[0])
    }
    for name in listed:
        if not (bundle / name).is_file():
            raise GrimaceError(f"{bundle / name} is in the manifest but not there")
    for path in sorted(bundle.rglob("*")):
        place = path.relative_to(bundle)
        name = place.as_posix()
        if not path.is_file() or not concerned(place.parts[0]) or name in (MANIFEST, SIGNATURE):
            continue
        if name not in listed:
            raise GrimaceError(f"{path} is there but not in the manifest")
        size, wanted = path.stat().st_size, listed[name]["bytes"]
        if size != wanted:
            raise GrimaceError(f"{path} has {size} bytes, the manifest says {wanted}")
        if tracking.sha256(path) != listed[name]["sha256"]:
            raise GrimaceError(f"{path}: its bytes are not those of the manifest (SHA-256)")
