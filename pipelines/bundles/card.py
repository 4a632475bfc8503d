"""The card of a bundle: a page of Markdown for the person who is to use it."""

from pathlib import Path
from typing import Any

USE = {
    "tflite": """```python
from ai_edge_litert.interpreter import Interpreter

interpreter = Interpreter(model_path="int8.tflite", num_threads=1)
interpreter.allocate_tensors()
interpreter.set_tensor(interpreter.get_input_details()[0]["index"], image[None])  # float32
interpreter.invoke()
answer = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])[0]
```""",
    "tfjs": """```js
const model = await tf.loadGraphModel("float16/model.json");
const answer = await model.execute(tf.tensor4d(image, [1, {height}, {width}, {channels}])).data();
```""",
    "tensorrt": """```python
import onnxruntime

session = onnxruntime.InferenceSession("float32.onnx")
answer = session.run(None, {{session.get_inputs()[0].name: image[None]}})[0][0]  # float32
```

An engine is for one generation of GPUs, in its name, and for the version of TensorRT for RTX that
the manifest names. For another GPU build one from `int8.onnx` or `float16.onnx`, outside of this
folder, which is signed: `python -m pipelines.exporters.tensorrt --onnx FOLDER/int8.onnx`.""",
}


def write(path: Path, manifest: dict[str, Any]) -> None:
    """Write the card.

    Args:
        path: the Markdown file.
        manifest: as `describe` gives it, with `licence`.
    """
    path.write_text(text(manifest))


def text(manifest: dict[str, Any]) -> str:
    """Return the card of a bundle with this manifest."""
    task, target, source = manifest["task"], manifest["target"], manifest["source"]
    taken, given = manifest["input"], manifest["output"]
    height, width, channels = taken["shape"]
    rows = "".join(
        f"| {name} | `{facts['file']}` | {facts['precision']} | {_notes(facts)} |\n"
        for name, facts in manifest["variants"].items()
    )
    answer = (
        f"seven probabilities: {', '.join(given['labels'])}"
        if task == "emotion"
        else f"{given['shape'][0]} points of the scheme {given['scheme']}, {given['meaning']}"
    )
    crop = taken["crop"]
    raised = f", its centre {crop['up']:g} of that side above the box's" if crop["up"] else ""
    use = USE[target].format(height=height, width=width, channels=channels)
    validation = source.get("validation")
    scored = (
        f"On validation the float32 model has {validation['metric']} {validation['value']:.4f}. "
        if validation
        else ""
    )
    return f"""# Grimace: {task}, {target}

{"Recognises seven facial expressions" if task == "emotion" else "Places facial landmarks"} in a
crop of one face. It finds no faces and knows nobody. All files hold the same model,
`{source["model"]}`, trained on the dataset `{source["dataset"]}`.

## Files

| variant | file | computes in | |
| --- | --- | --- | --- |
{rows}
`manifest.json` has all of this as data, with the SHA-256 of every file, and `manifest.sig` is its
signature; `golden.json` has images and answers to try an installation with; `sbom.cdx.json` is the
bill of materials.

## In and out

In: float32 ({height}, {width}, {channels}), {taken["colour"]}, values 0 to 255 as they come from
the picture. Crop: {crop["shape"]}, widened by {crop["margin"]:g}
{crop["margin_unit"]}{raised}. The face box is that {crop["box"]}. The order of steps is
`preprocessing` in the manifest.

Out: float32, {answer}.

{use}

## How good it is

{scored}What each of these files loses against it, on the whole test split in its own runtime, is
measured by `python -m pipelines.verify --task {task}`, which refuses a bundle that was changed.

## Limits

It was measured on faces like those it was trained on, and on no others: other cameras, ages, skin
tones, poses and light may do worse, and the card of the dataset says what is known of its bias
(`pipelines/datasets/{source["dataset"]}.md`). A facial expression is not what a person feels.
Decide nothing about people by it.

## Licence

Code: {manifest["licence"]["code"]}. Training data: {manifest["licence"]["training_data"]}
Allowed use of them: {manifest["licence"]["allowed_use"]}

## Where it comes from

- trained model: SHA-256 `{source["model_sha256"]}`; in MLflow the run with the tag
  `grimace.model_sha256` of that value
- data version: `{source["data_version"]}`
- code: `{source["git_commit"]}`
"""


def _notes(facts: dict[str, Any]) -> str:
    found = facts.get("quantisation")
    if not found or "layers" not in found:
        return ""
    kept = len(found["float_layers"])
    return f"{kept} of {found['layers']} layers left in float"
