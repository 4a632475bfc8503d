"""What measures are known by: a change of any code that makes them must make them anew."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.checks import measures

ROOT = Path(__file__).parents[3]
FILES = [(ROOT / "pipelines" / name).resolve() for name in measures.SOURCES]


def imported(file: Path) -> Iterator[Path]:
    """The project's modules that a file imports, anywhere in it; of packages their modules."""
    for node in ast.walk(ast.parse(file.read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            module = ROOT.joinpath(*name.split(".")).with_suffix(".py")
            if name.startswith(("pipelines.", "models.")) and module.is_file():
                yield module


@pytest.mark.parametrize(
    "file", [file for file in FILES if file.parent.name == "checks"], ids=lambda f: f.stem
)
def test_what_measuring_imports_is_among_the_sources(file: Path) -> None:
    assert {*imported(file)} <= {*FILES}


def test_the_stage_depends_on_all_sources() -> None:
    stage = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["filter"]["do"]
    for file in FILES:
        path = file.relative_to(ROOT)
        assert any(path.is_relative_to(dep) for dep in stage["deps"]), f"{path} is no dependency"


def test_the_detectors_code_is_among_what_a_digest_stands_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = measures.settings_digest(("blazeface",))
    real, detectors = Path.read_text, ROOT / "pipelines/detectors.py"

    def changed(path: Path, *arguments: Any, **options: Any) -> str:
        return real(path, *arguments, **options) + (
            "# changed" if path.resolve() == detectors else ""
        )

    monkeypatch.setattr(Path, "read_text", changed)
    assert measures.settings_digest(("blazeface",)) != before
