"""The bill of materials of a bundle, CycloneDX 1.6 in JSON."""

from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

from pipelines import tracking

MADE_WITH = {
    "tflite": ("keras", "tensorflow"),
    "tfjs": ("keras", "tensorflow", "tensorflowjs"),
    "tensorrt": ("keras", "tensorflow", "tf2onnx", "onnx", "onnxruntime", "onnxconverter-common"),
}
RUNS_IN = {  # one of them; the graphs were measured in these versions
    "tflite": (("pypi", "ai-edge-litert"), ("npm", "@litertjs/core")),
    "tfjs": (
        ("npm", "@tensorflow/tfjs-core"),
        ("npm", "@tensorflow/tfjs-converter"),
        ("npm", "@tensorflow/tfjs-backend-wasm"),
    ),
    "tensorrt": (("pypi", "onnxruntime"), ("pypi", "tensorrt-rtx-cu13")),
}


def write(path: Path, bundle: Path, manifest: dict[str, Any]) -> None:
    """Write what a bundle's graphs are, were made of and with, and what runs them.

    Args:
        path: the JSON file.
        bundle: the folder, with its graphs.
        manifest: as `describe` gives it.
    """
    source, task, target = manifest["source"], manifest["task"], manifest["target"]
    root = Component(
        name=f"grimace-{task}-{target}",
        type=ComponentType.MACHINE_LEARNING_MODEL,
        version=source["model_sha256"][:12],
        bom_ref=f"{task}-{target}",
    )
    graphs = [
        Component(
            name=file.relative_to(bundle).as_posix(),
            type=ComponentType.FILE,
            bom_ref=f"file:{file.relative_to(bundle).as_posix()}",
            hashes=[HashType(alg=HashAlgorithm.SHA_256, content=tracking.sha256(file))],
        )
        for file in sorted(bundle.rglob("*"))
        if file.is_file()
    ]
    data = Component(
        name=source["dataset"],
        type=ComponentType.DATA,
        version=source["data_version"],
        bom_ref=f"data:{source['dataset']}",
        properties=[Property(name="grimace:licence", value=manifest["licence"]["training_data"])],
    )
    trained = Component(
        name=f"{source['model']}.keras",
        type=ComponentType.MACHINE_LEARNING_MODEL,
        version=source["model_sha256"][:12],
        bom_ref="trained-model",
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=source["model_sha256"])],
    )
    runtimes = [_package(*package) for package in RUNS_IN[target]]
    serial = uuid5(NAMESPACE_URL, f"grimace/{task}/{target}/{source['model_sha256']}")
    bom = Bom(components=[*graphs, data, trained, *runtimes], serial_number=serial)
    bom.metadata.component = root
    bom.metadata.tools.components.update(_package("pypi", name) for name in MADE_WITH[target])
    bom.register_dependency(root, [*graphs, *runtimes])
    for graph in graphs:
        bom.register_dependency(graph, [trained])
    bom.register_dependency(trained, [data])
    path.write_text(JsonV1Dot6(bom).output_as_string(indent=2) + "\n")


def _package(kind: str, name: str) -> Component:
    group, _, short = name.rpartition("/")
    number = _npm_version(name) if kind == "npm" else version(name)
    return Component(
        name=short,
        group=group or None,
        type=ComponentType.LIBRARY,
        version=number,
        bom_ref=f"{kind}:{name}",
        purl=PackageURL(kind, group or None, short, number),
    )


def _npm_version(name: str) -> str:
    import json

    package = Path(__file__).parents[1] / "runtimes" / "javascript" / "package.json"
    return str(json.loads(package.read_text())["dependencies"][name])
