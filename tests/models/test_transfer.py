from pathlib import Path
from urllib.error import URLError

import keras
import numpy as np
import pytest
from keras import layers

from models import emotion, transfer

FILE = "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_96_no_top.h5"
RNG = np.random.default_rng(1)
IMAGES = RNG.integers(0, 256, (4, 32, 32, 1)).astype(np.float32)


def build(weights: str | None) -> keras.Model:
    return emotion.build("mobilenet_v2", (), 32, 1, 0.0, weights)


def base_of(model: keras.Model) -> keras.Model:
    return next(layer for layer in model.layers if isinstance(layer, keras.Model))


@pytest.fixture(scope="module")
def base() -> keras.Model:
    """A base with weights and statistics unlike those of any other."""
    base = base_of(build(None))
    base.set_weights([w + RNG.random(w.shape) / 50 for w in base.get_weights()])
    return base


@pytest.fixture(scope="module")
def weights(base: keras.Model, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("weights") / "base.weights.h5"
    base.save_weights(path)
    return str(path)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keras's folder of models, empty, on a machine without a network."""
    from keras.src.backend import config
    from keras.src.utils import file_utils

    def unreachable(*_: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setattr(config, "_KERAS_DIR", str(tmp_path))
    monkeypatch.setattr(file_utils, "urlretrieve", unreachable)
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("features", [transfer.vgg19, transfer.mobilenet_v2])
def test_pixels_are_prepared_as_the_base_expects(features, channels: int, monkeypatch) -> None:
    monkeypatch.setattr(transfer, "_base", lambda application, file, images, weights: images)
    image = keras.Input((96, 96, channels))
    model = keras.Model(image, features(image, None))
    prepared = next(x for x in model.layers if isinstance(x, layers.Rescaling)).output
    pixels = RNG.integers(0, 256, (2, 96, 96, channels)).astype(np.float32)
    answer = keras.ops.convert_to_numpy(keras.Model(image, prepared)(pixels))
    colour = np.repeat(pixels, 3, -1) if channels == 1 else pixels
    if features is transfer.vgg19:
        expected = colour[..., ::-1] - np.float32([103.939, 116.779, 123.68])
    else:
        expected = colour / 127.5 - 1
    assert np.allclose(answer, expected, atol=1e-4)


def test_small_images_are_enlarged_and_large_ones_left() -> None:
    for size, side in ((48, 96), (96, 96), (128, 128)):
        model = emotion.build("mobilenet_v2", (), size, 1, 0.0)
        assert base_of(model).input_shape == (None, side, side, 3)


def test_missing_imagenet_weights_are_explained(cache: Path) -> None:
    for network, file in (
        ("mobilenet_v2", FILE),
        ("vgg19", "vgg19_weights_tf_dim_ordering_tf_kernels_notop.h5"),
    ):
        with pytest.raises(transfer.WeightsUnavailableError) as error:
            emotion.build(network, (), 48, 1, 0.0, "imagenet")
        message = str(error.value)
        assert str(cache / file) in message and "by hand" in message
        assert "`weights: null`" in message and "not known" in message


def test_imagenet_weights_put_there_by_hand_are_taken(cache: Path, base: keras.Model) -> None:
    base.save(cache / FILE)  # the old format, as Keras publishes them
    model = build("imagenet")
    assert all(map(np.array_equal, base_of(model).get_weights(), base.get_weights()))


def test_a_file_of_the_base_is_taken(base: keras.Model, weights: str, tmp_path: Path) -> None:
    base.save(tmp_path / "base.keras")
    for path in (weights, str(tmp_path / "base.keras")):
        loaded = base_of(build(path)).get_weights()
        assert all(map(np.array_equal, loaded, base.get_weights()))


@pytest.mark.filterwarnings("ignore:Skipping nested container")
def test_a_file_that_is_missing_or_of_another_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(transfer.WeightsUnavailableError, match="no such file"):
        build(str(tmp_path / "none.weights.h5"))
    other = tmp_path / "other.weights.h5"
    keras.Sequential([keras.Input((3,)), layers.Dense(2)]).save_weights(other)
    with pytest.raises(transfer.WeightsUnavailableError, match="does not hold the weights of Mob"):
        build(str(other))


def changed_by_a_step(model: keras.Model) -> dict[str, bool]:
    """Train one step; tell which parts of the model have other weights afterwards."""
    base = base_of(model)
    normal = [x for x in base.layers if isinstance(x, layers.BatchNormalization)]
    parts = {
        "convolutions": [w for x in base.layers if x not in normal for w in x.weights],
        "scales": [w for x in normal for w in (x.gamma, x.beta)],
        "statistics": [w for x in normal for w in (x.moving_mean, x.moving_variance)],
        "head": [w for x in model.layers if x is not base for w in x.weights],
    }
    before = {name: [w.numpy() for w in part] for name, part in parts.items()}
    model.compile(keras.optimizers.SGD(0.1), "categorical_crossentropy", run_eagerly=True)
    model.train_on_batch(IMAGES, np.eye(7)[:4])
    return {
        name: any(
            not np.array_equal(old, w.numpy()) for old, w in zip(before[name], part, strict=True)
        )
        for name, part in parts.items()
    }


def test_the_two_phases_also_after_saving(weights: str, tmp_path: Path) -> None:
    first = {"convolutions": False, "scales": False, "statistics": False, "head": True}
    second = {"convolutions": True, "scales": False, "statistics": False, "head": True}
    model = build(weights)
    transfer.set_frozen(model, True)
    assert changed_by_a_step(model) == first
    model.save(tmp_path / "model.keras")
    model = keras.models.load_model(tmp_path / "model.keras")
    assert changed_by_a_step(model) == first
    transfer.set_frozen(model, False)
    assert changed_by_a_step(model) == second
    model.save(tmp_path / "model.keras")
    assert changed_by_a_step(keras.models.load_model(tmp_path / "model.keras")) == second


def test_as_built_only_a_pretrained_normalisation_is_fixed(weights: str) -> None:
    assert not changed_by_a_step(build(weights))["statistics"]
    untrained = build(None)
    transfer.set_frozen(untrained, True)
    assert not any(x for part, x in changed_by_a_step(untrained).items() if part != "head")
    transfer.set_frozen(untrained, False)
    assert all(changed_by_a_step(untrained).values())


def test_other_networks_have_no_base_to_freeze() -> None:
    with pytest.raises(ValueError, match="emotion_plain is no transfer network"):
        transfer.set_frozen(emotion.build("plain", (4,), 32, 1, 0.0), True)
