import hashlib
import json
import os
import shutil

import pytest

from pipelines import bundles
from pipelines.bundles import card
from pipelines.cli import GrimaceError


def refused(bundle) -> str:
    with pytest.raises(GrimaceError) as raised:
        bundles.check_files(bundle, bundles.read(bundle))
    return str(raised.value)


@pytest.mark.parametrize("target", ["tflite", "tfjs", "tensorrt"])
@pytest.mark.parametrize("task", ["emotion", "landmarks"])
def test_a_manifest_names_every_file_and_says_how_to_use_them(make, task, target):
    bundle = make(task, target)
    manifest = bundles.read(bundle)
    bundles.check_files(bundle, manifest)
    listed = {file["path"]: file for file in manifest["files"]}
    there = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert set(listed) == there - {"manifest.json", "manifest.sig"}
    for name, file in listed.items():
        content = (bundle / name).read_bytes()
        assert file["bytes"] == len(content)
        assert file["sha256"] == hashlib.sha256(content).hexdigest()
    assert (manifest["schema"], manifest["task"], manifest["target"]) == (3, task, target)
    for facts in manifest["variants"].values():
        assert (bundle / facts["file"]).exists()
        assert facts["tolerance"] == bundles.TOLERANCES[task][facts["precision"]]
    assert all((bundle / manifest[name]).is_file() for name in ("golden", "card", "sbom"))


def test_a_dataset_of_whole_frames_has_its_own_crop(make):
    """FER-2013's frames have no points: the crop that matches them was measured."""
    meta = {"task": "emotion", "size": 48, "channels": 1, "margin": 0.05, "dataset": "fer2013"}
    meta["classes"] = list("abcdefg")
    source = json.loads((make() / "manifest.json").read_text())["source"]
    manifest = bundles.describe("tflite", {}, meta, source)
    (step,) = [step for step in manifest["preprocessing"] if step["step"] == "crop"]
    for placing in (step, manifest["input"]["crop"]):
        assert (placing["margin"], placing["up"]) == (0.06, 0.14)
    manifest["licence"] = {"code": "MIT", "training_data": "", "allowed_use": ""}
    told = " ".join(card.text(manifest).split())
    assert (
        "widened by 0.06 of the longer side" in told
        and "its centre 0.14 of that side above the box" in told
    )


def test_input_output_and_preprocessing_are_data(make):
    manifest = bundles.read(make("emotion"))
    taken, given = manifest["input"], manifest["output"]
    assert (taken["shape"], taken["dtype"], taken["range"]) == ([16, 16, 1], "float32", [0, 255])
    assert taken["colour"].startswith("grey") and taken["crop"]["margin"] == 0.1
    assert given["labels"] == list("abcdefg") and given["range"] == [0, 1]
    steps = {step["step"]: step for step in manifest["preprocessing"]}
    assert list(steps) == ["rotate", "flatten", "colour", "crop", "resize", "cast"]
    assert sum(steps["colour"]["weights"]) == pytest.approx(1)
    assert steps["resize"]["to"] == [16, 16] and steps["crop"]["margin"] == 0.1
    points = bundles.read(make("landmarks", name="other"))
    assert points["input"]["colour"] == "RGB"
    assert points["output"]["scheme"] == "kaggle-15"
    assert points["output"]["shape"] == [15, 2] and len(points["output"]["mirror"]) == 15


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda b: flip(b / "int8.tflite"), "int8.tflite: its bytes are not those"),
        (lambda b: os.truncate(b / "int8.tflite", 50), "has 50 bytes, the manifest says 100"),
        (lambda b: (b / "int8.tflite").unlink(), "int8.tflite is in the manifest but not there"),
        (lambda b: swap(b / "int8.tflite", b / "float32.tflite"), "its bytes are not those"),
        (lambda b: (b / "more.tflite").touch(), "more.tflite is there but not in the manifest"),
        (lambda b: flip(b / "golden.json"), "golden.json: its bytes are not those"),
        (lambda b: edit(b, margin=0.2), "was changed after it was signed"),
        (lambda b: tamper(b, "int8.tflite"), "was changed after it was signed"),
        (lambda b: os.truncate(b / "manifest.json", 90), "was changed after it was signed"),
        (lambda b: (b / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda b: (b / "manifest.sig").unlink(), "manifest.sig is missing"),
        (lambda b: os.truncate(b / "manifest.sig", 40), "manifest.sig is damaged"),
        (lambda b: (b / "manifest.sig").write_text("{}"), "manifest.sig is damaged"),
    ],
)
def test_what_is_not_as_it_was_signed_is_refused(make, damage, reason):
    bundle = make()
    damage(bundle)
    assert reason in refused(bundle)


def test_the_signature_of_another_bundle_does_not_fit(make):
    one, other = make(name="one"), make(name="other")
    swap(one / "manifest.sig", other / "manifest.sig")
    assert "was changed after it was signed" in refused(one)


def test_part_of_a_bundle_can_be_checked(make):
    bundle = make()
    manifest = bundles.read(bundle)
    flip(bundle / "int8.tflite")
    bundles.check_files(bundle, manifest, lambda part: part != "int8.tflite")
    with pytest.raises(GrimaceError, match="int8"):
        bundles.check_files(bundle, manifest, lambda part: part == "int8.tflite")


@pytest.mark.parametrize("change", [{"schema": 1}, {"files": [{}]}, {"variants": {}}])
def test_a_signed_manifest_of_another_kind_is_refused(make, change):
    bundle = make()
    manifest = json.loads((bundle / "manifest.json").read_text()) | change
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    bundles.signatures.sign(bundle / "manifest.json", bundle / "manifest.sig")
    with pytest.raises(GrimaceError, match=r"has schema 1, this code reads 3|is damaged"):
        bundles.read(bundle)


def flip(path) -> None:
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])


def swap(one, other) -> None:
    aside = one.with_name("aside")
    shutil.move(one, aside)
    shutil.move(other, one)
    shutil.move(aside, other)


def edit(bundle, margin: float) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["input"]["crop"]["margin"] = margin
    (bundle / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def tamper(bundle, name: str) -> None:
    """Change a graph and, as who tampers would, its checksum."""
    flip(bundle / name)
    manifest = json.loads((bundle / "manifest.json").read_text())
    for file in manifest["files"]:
        file["sha256"] = hashlib.sha256((bundle / file["path"]).read_bytes()).hexdigest()
    (bundle / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
