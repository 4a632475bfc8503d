"""What all networks have in common, emotion and landmarks alike."""

import re
from functools import cache
from types import ModuleType

import keras
import numpy as np
import pytest

from models import emotion, landmarks
from models.cost import multiply_adds

MODULES = {"emotion": emotion, "landmarks": landmarks}
ALL = [(task, name) for task, module in MODULES.items() for name in module.NETWORKS]
PRETRAINED = ["vgg19", "mobilenet_v2"]
HEAVY = ["vgg", "vgg19"]  # tens of millions of weights
LIGHT = [(task, name) for task, name in ALL if name not in HEAVY]


def build(
    task: str, name: str, size: int, widths: tuple[int, ...], dropout: float = 0.1
) -> keras.Model:
    rest = {"points": 15} if task == "landmarks" else {}
    return MODULES[task].build(name, widths, size, 1, dropout, **rest)


@cache
def setting(module: ModuleType, name: str) -> tuple[tuple[int, ...], dict[str, int]]:
    """Read the recommended setting out of a docstring."""
    line = re.search(
        r"Setting: size (\d+), channels (\d+), widths \(([\d, ]*)\)(?:, points (\d+))?\n",
        module.NETWORKS[name].__doc__,
    )
    size, channels, widths, points = line.groups()
    rest = {"size": int(size), "channels": int(channels)} | (
        {"points": int(points)} if points else {}
    )
    return tuple(int(width) for width in widths.split(",") if width), rest


def small(task: str, name: str) -> keras.Model:
    """The network with few channels on a small image, or as it is where its shape is fixed."""
    widths, rest = setting(MODULES[task], name)
    return build(task, name, 32 if widths else rest["size"], (4, 6) if widths else ())


def number(docstring: str, name: str) -> int:
    return int(re.search(rf"\n    {name}: ([\d,]+)\n", docstring)[1].replace(",", ""))


@pytest.mark.parametrize(("task", "name"), ALL)
def test_the_docstring_tells_the_truth(task: str, name: str) -> None:
    docstring = MODULES[task].NETWORKS[name].__doc__
    widths, rest = setting(MODULES[task], name)
    model = MODULES[task].build(name, widths, dropout=0.1, **rest)
    assert model.count_params() == number(docstring, "Parameters")
    assert multiply_adds(model) == number(docstring, "Multiply-adds")
    for field in ("Source", "Input", "Output", "Score"):  # the last is held against the results
        assert re.search(rf"\n    {field}: .", docstring), field


def test_sizes_that_are_promised() -> None:
    compact = emotion.NETWORKS["residual"].__doc__
    assert number(compact, "Parameters") <= 1_500_000
    for name in ("simcc", "heatmap"):
        assert number(landmarks.NETWORKS[name].__doc__, "Parameters") <= 600_000


def test_the_seeds_networks_are_as_large_as_published() -> None:
    """The sums that Keras printed in the notebooks they come from."""
    published = {"emojify": 2_345_607, "four_block": 4_478_727, "emoji_swap": 1_376_167}
    for name, parameters in published.items():
        assert number(emotion.NETWORKS[name].__doc__, "Parameters") == parameters


@pytest.mark.parametrize(("task", "name"), ALL)
def test_mixed_precision_answers_in_float32(task: str, name: str) -> None:
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        model = small(task, name)
    finally:
        keras.mixed_precision.set_global_policy("float32")
    images = np.random.default_rng(1).integers(0, 256, (2, *model.input_shape[1:]))
    answer = model(images.astype(np.float32), training=False)
    assert keras.backend.standardize_dtype(answer.dtype) == "float32"
    answer = keras.ops.convert_to_numpy(answer)
    if task == "emotion":
        assert answer.shape == (2, 7) and np.allclose(answer.sum(1), 1, atol=1e-5)
        assert answer.min() >= 0
    else:
        assert answer.shape == (2, 15, 2) and np.isfinite(answer).all()


@pytest.mark.parametrize(("task", "name"), ALL)
def test_one_step_moves_every_trainable_weight(task: str, name: str) -> None:
    model = small(task, name)
    loss = "categorical_crossentropy" if task == "emotion" else "mse"
    model.compile(keras.optimizers.SGD(0.01), loss, run_eagerly=True)
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (4, *model.input_shape[1:])).astype(np.float32)
    truth = np.eye(7)[:4] if task == "emotion" else rng.random((4, 15, 2))
    before = [keras.ops.convert_to_numpy(weight) for weight in model.trainable_weights]
    model.train_on_batch(images, truth)
    still = [
        weight.path
        for weight, old in zip(model.trainable_weights, before, strict=True)
        if np.array_equal(old, keras.ops.convert_to_numpy(weight))
    ]
    assert before and not still


@pytest.mark.parametrize(("task", "name"), LIGHT)
def test_saved_and_loaded_it_answers_the_same(task: str, name: str, tmp_path) -> None:
    model = small(task, name)
    rng = np.random.default_rng(1)
    model.set_weights([w + rng.random(w.shape) / 10 for w in model.get_weights()])  # statistics too
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    images = rng.integers(0, 256, (2, *model.input_shape[1:])).astype(np.float32)
    expected = keras.ops.convert_to_numpy(model(images, training=False))
    answer = keras.ops.convert_to_numpy(again(images, training=False))
    assert np.array_equal(answer, expected) and np.isfinite(answer).all()


@pytest.mark.parametrize(("task", "name"), ALL)
def test_widths_must_suit_the_network(task: str, name: str) -> None:
    if setting(MODULES[task], name)[0]:
        with pytest.raises(ValueError, match=f"{name} needs `widths`"):
            build(task, name, 48, ())
    else:
        with pytest.raises(ValueError, match=f"{name} has a fixed shape"):
            build(task, name, 48, (8, 16))


@pytest.mark.parametrize(("task", "name"), [x for x in ALL if x[1] not in PRETRAINED])
def test_only_transfer_networks_take_weights(task: str, name: str) -> None:
    rest = {"points": 15} if task == "landmarks" else {}
    widths = setting(MODULES[task], name)[0]
    with pytest.raises(ValueError, match=f"{name} has no pretrained part"):
        MODULES[task].build(name, widths, 48, 1, 0.1, weights="imagenet", **rest)


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no network 'resnet'; there are plain, residual, teacher"):
        build("emotion", "resnet", 48, (8,))
