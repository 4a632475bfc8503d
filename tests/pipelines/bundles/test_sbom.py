import hashlib
import json
from importlib.metadata import version

import pytest
from cyclonedx.model.bom import Bom


@pytest.mark.parametrize("target", ["tflite", "tfjs", "tensorrt"])
def test_it_names_graphs_model_data_tools_and_runtimes(make, target):
    bundle = make("emotion", target)
    content = json.loads((bundle / "sbom.cdx.json").read_text())
    assert (content["bomFormat"], content["specVersion"]) == ("CycloneDX", "1.6")
    Bom.from_json(content)  # the library's own reader takes it
    parts = {part["bom-ref"]: part for part in content["components"]}
    for path in bundle.rglob("*"):
        if path.suffix in (".tflite", ".onnx") or path.name == "model.json":
            (entry,) = parts[f"file:{path.relative_to(bundle).as_posix()}"]["hashes"]
            assert entry["content"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert parts["trained-model"]["hashes"][0]["content"] == "ab" * 32
    assert parts["data:synthetic"]["type"] == "data"
    runtime = {"tflite": "pypi:ai-edge-litert", "tensorrt": "pypi:onnxruntime"}
    if target == "tfjs":
        assert (
            parts["npm:@tensorflow/tfjs-core"]["purl"] == "pkg:npm/%40tensorflow/tfjs-core@4.22.0"
        )
    else:
        name = runtime[target].removeprefix("pypi:")
        assert parts[runtime[target]]["purl"] == f"pkg:pypi/{name}@{version(name)}"
    tools = {tool["name"]: tool["version"] for tool in content["metadata"]["tools"]["components"]}
    assert tools["keras"] == version("keras")
    needs = {row["ref"]: set(row.get("dependsOn", [])) for row in content["dependencies"]}
    assert needs["trained-model"] == {"data:synthetic"}
    assert (
        set(runtime.get(target, "npm:@tensorflow/tfjs-core").split()) <= needs[f"emotion-{target}"]
    )
