from dataclasses import replace
from pathlib import Path
from typing import Any

import albumentations
import cv2
import numpy as np
import pytest
from albumentations.augmentations.dropout.transforms import BaseDropout

from models.schemes import IBUG_68, KAGGLE_15, SCHEMES, Scheme
from pipelines.cli import GrimaceError
from pipelines.datasets import synthetic
from pipelines.datasets.example import Example
from pipelines.params import AugmentTask, Task, Transform, load_params
from pipelines.views import Recipe, augmented_views, build_policy, plain_view, transform_view

ROOT = Path(__file__).parents[2]
DEFAULT = load_params(ROOT / "params.yaml").augment

# Kaggle-15 on a face that is nowhere symmetric, within 100 × 100.
FACE = np.array(
    [
        (69.1, 38.2), (29.7, 35.3), (60.4, 39.9), (79.8, 37.1), (38.6, 37.4), (20.3, 34.8),
        (57.7, 27.6), (87.2, 24.3), (41.3, 29.8), (12.9, 22.4),
        (46.2, 57.5), (66.6, 78.8), (31.1, 73.7), (50.4, 70.2), (48.5, 88.9),
    ]
)  # fmt: skip


def recipe(
    policy: tuple[Transform, ...], jitter: float = 0.06, views: int = 1, **task: Any
) -> Recipe:
    settings = AugmentTask(
        views=views,
        jitter_shift=jitter,
        jitter_scale=jitter * 2,
        policies={"tried": policy},
        policy="tried",
    )
    crop = Task(**{"dataset": "synthetic", "size": 96, "channels": 1, "margin": 0.15} | task)
    return Recipe("landmarks", crop, settings, seed=2026)


def policy_of(recipe: Recipe) -> Any:
    return build_policy(recipe.settings, recipe.task, recipe.name)


def example_of(points: np.ndarray, visible: np.ndarray | None = None, id: str = "a") -> Example:
    visible = np.ones(len(points), bool) if visible is None else visible
    points = np.where(visible[:, None], points, 0).astype(np.float32)
    return Example(id, b"", landmarks=points, visible=visible)


# Landmarks stay on their pixels. Of each point a picture is made that shows a dot there and
# nothing else; all are augmented alike, because only the example's id decides how. Where the dots
# have gone is read from the pixels.


def dot(shape: tuple[int, int], at: np.ndarray, sigma: float) -> np.ndarray:
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]]
    squared = (x - at[0]) ** 2 + (y - at[1]) ** 2
    return np.rint(60 + 140 * np.exp(-squared / (2 * sigma**2))).astype(np.uint8)[..., None]


def position(image: np.ndarray) -> np.ndarray:
    """Centre of the dot in pixels, NaN where it is cut off by the frame or outside."""
    light = image[..., 0].astype(float)
    light -= np.median(light)
    light[light < 0.15 * max(light.max(), 60)] = 0
    rim = light.copy()
    rim[1:-1, 1:-1] = 0
    if not light.any() or rim.any():
        return np.full(2, np.nan)
    y, x = np.indices(light.shape)
    return np.array([(x * light).sum(), (y * light).sum()]) / light.sum()


def turn(points: np.ndarray) -> float:
    """Sign of the triangle of inner eye corners and nose: left or right handed."""
    a, b, c = points[TRIANGLE[len(points)]]
    return float(np.sign((b - a)[0] * (c - a)[1] - (b - a)[1] * (c - a)[0]))


def transform(name: str, **arguments: Any) -> tuple[Transform, ...]:
    return (Transform(transform=name, p=1.0, **arguments),)


def is_geometric(transform: Transform) -> bool:
    kind = getattr(albumentations, transform.transform)
    return issubclass(kind, albumentations.DualTransform) and not issubclass(kind, BaseDropout)


def geometry_of_policies() -> dict[str, tuple[Transform, ...]]:
    """What moves points in each policy of params.yaml, together and one by one."""
    found = {}
    for task in ("emotion", "landmarks"):
        for name, transforms in DEFAULT.named(task).policies.items():  # type: ignore[arg-type]
            moving = tuple(filter(is_geometric, transforms))
            found[f"{task} {name}"] = moving
            for item in moving:
                always = Transform(**item.model_dump() | {"p": 1.0})
                found[f"{task} {name} {item.transform}"] = (always,)
    unlike = {repr(transforms): name for name, transforms in reversed(found.items())}
    return {name: found[name] for name in sorted(unlike.values())}


POLICIES = geometry_of_policies() | {
    "nothing": (),
    "HorizontalFlip": transform("HorizontalFlip"),
    "VerticalFlip": transform("VerticalFlip"),
    "Transpose": transform("Transpose"),
    "D4": transform("D4"),
    "Rotate": transform("Rotate", limit=[-45, 45], border_mode=1),
    "RotateInsideOut": transform("Rotate", limit=[90, 180], border_mode=1),
    "SafeRotate": transform("SafeRotate", limit=[-30, 30], border_mode=1),
    "CropAndPad": transform("CropAndPad", percent=[-0.1, 0.1], keep_size=True, border_mode=1),
    "Perspective": transform("Perspective", scale=[0.03, 0.08], border_mode=1),
    "Affine": transform(
        "Affine", scale=[0.8, 1.2], rotate=[-20, 20], shear=[-10, 10], border_mode=1
    ),
}


# Of each scheme a face that is nowhere symmetric, within 100 × 100; inner eye corners and nose.
(SYNTHETIC,) = (face.landmarks for face in synthetic.examples(1, 5))
FACES = {15: FACE, 68: (SYNTHETIC - SYNTHETIC.min(0)) / np.ptp(SYNTHETIC, 0).max() * 80 + 10}
TRIANGLE = {15: [2, 4, 10], 68: [39, 42, 30]}


@pytest.mark.parametrize(
    ("name", "scale"),
    [(name, 1.4) for name in POLICIES]
    # Pictures much smaller and much larger than the crop.
    + [(name, scale) for name in ("landmarks V4", "CropAndPad") for scale in (0.5, 4.0)],
)
@pytest.mark.parametrize("size", [15, 68])
def test_landmarks_stay_on_their_pixels(name: str, scale: float, size: int) -> None:
    work = recipe(POLICIES[name], views=10 if size == 15 else 6, margin=0.3)
    policy = policy_of(work)
    points = FACES[size] * scale + [20.3, 31.8]
    example = example_of(points)
    shape = (int(130 * scale + 40), int(120 * scale + 70))
    dots = [dot(shape, point, sigma=1.6 * scale * 1.3) for point in points]
    # By point, then by view.
    all_views = [augmented_views(example, image, work, policy) for image in dots]
    errors, mirrored = [], set()
    for views in zip(*all_views, strict=True):
        landmarks, visible = views[0][1:]
        found = np.array([position(image) for image, *_ in views])
        assert all(np.array_equal(other, landmarks) for _, other, _ in views)
        assert np.isfinite(found[TRIANGLE[size]]).all(), "the triangle left the frame"
        flipped = turn(found) != turn(points)
        mirrored.add(flipped)
        for number, at in enumerate(found):
            row = SCHEMES[size].mirror[number] if flipped else number
            if np.isfinite(at).all():
                assert visible[row]
                errors.append(np.abs(landmarks[row] * 96 - 0.5 - at).max())
    assert len(errors) > 100
    assert max(errors) < 0.25
    assert np.mean(errors) < 0.1
    if name in ("landmarks V4", "emotion V4", "D4"):
        assert mirrored == {False, True}


@pytest.mark.parametrize("scheme", [KAGGLE_15, IBUG_68], ids=lambda scheme: scheme.name)
def test_mirroring_twice_gives_the_picture_and_its_names_back(scheme: Scheme) -> None:
    rng = np.random.default_rng(1)
    noise = rng.integers(0, 256, (120, 120), np.uint8)
    image = cv2.GaussianBlur(noise, (0, 0), 3)[..., None]
    example = example_of(rng.uniform(10, 110, (scheme.size, 2)), rng.random(scheme.size) < 0.8)
    flop = recipe(transform("HorizontalFlip"), jitter=0)
    # Mirrored by hand: pixels, places, and the names of left and right.
    mirror = list(scheme.mirror)
    turned = example.landmarks * [-1, 1] + [119, 0]
    by_hand = example_of(turned[mirror], example.visible[mirror])
    policy = policy_of(flop)
    (again,) = augmented_views(by_hand, image[:, ::-1].copy(), flop, policy)
    (once,) = augmented_views(example, image, flop, policy)
    for found, expected in [
        (again, plain_view(example, image, flop.task)),
        (once, plain_view(by_hand, image[:, ::-1].copy(), flop.task)),
    ]:
        assert np.abs(found[0].astype(int) - expected[0]).max() <= 1
        np.testing.assert_allclose(found[1], expected[1], atol=1e-5)
        assert np.array_equal(found[2], expected[2])
    assert not np.array_equal(once[2], again[2])


# Which points survive


def test_points_out_of_frame_become_invisible_and_keep_their_place() -> None:
    work = recipe((), jitter=0, margin=-0.2)  # cuts the outer points off
    example = example_of(FACES[68] + 20)
    image = np.zeros((140, 140, 1), np.uint8)
    ((_, landmarks, visible),) = augmented_views(example, image, work, policy_of(work))
    _, plain, _ = plain_view(example, image, work.task)
    inside = ((plain >= 0) & (plain <= 1)).all(1)
    assert 10 < inside.sum() < 60
    assert np.array_equal(visible, inside)
    np.testing.assert_allclose(landmarks[inside], plain[inside], atol=1e-5)
    assert (landmarks[~inside] == 0).all()
    assert landmarks.dtype == np.float32 and landmarks.shape == (68, 2) and visible.dtype == bool


class Recording:
    """The real policy, remembering the points it was given."""

    def __init__(self, policy: Any) -> None:
        self.policy, self.given = policy, np.zeros((0, 2))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    def __call__(self, **targets: np.ndarray) -> Any:
        self.given = np.concatenate([self.given, targets.get("keypoints", self.given[:0])])
        return self.policy(**targets)


@pytest.mark.parametrize("mirrored", [False, True])
def test_missing_landmarks_never_enter_the_policy_and_stay_missing(mirrored: bool) -> None:
    work = recipe(transform("HorizontalFlip") if mirrored else (), jitter=0)
    missing = np.arange(15) % 5 == 1
    example = example_of(FACE + 20, ~missing)
    # Were what is stored there taken for a place, this would be one within the frame.
    example.landmarks[missing] = [65, 65]
    policy = Recording(policy_of(work))
    image = np.zeros((140, 140, 1), np.uint8)
    ((_, landmarks, visible),) = augmented_views(example, image, work, policy)
    assert len(policy.given) == 12 + 3  # and the three of the probe
    expected = missing[list(KAGGLE_15.mirror)] if mirrored else missing
    assert np.array_equal(visible, ~expected)
    assert (landmarks[expected] == 0).all() and (landmarks[~expected] != 0).all()


def test_a_picture_without_landmarks() -> None:
    work = recipe(DEFAULT.emotion.policies["modern"], views=5)
    image = np.zeros((48, 48, 1), np.uint8)
    for crop, landmarks, visible in augmented_views(
        Example("a", b""), image, work, policy_of(work)
    ):
        assert crop.shape == (96, 96, 1) and landmarks.shape == (0, 2) and visible.shape == (0,)


def test_emotion_follows_no_points() -> None:
    work = replace(recipe(DEFAULT.emotion.policies["modern"], views=5), name="emotion")
    image = np.zeros((140, 140, 1), np.uint8)
    policy = Recording(policy_of(work))
    for _, landmarks, visible in augmented_views(example_of(FACE + 20), image, work, policy):
        assert landmarks.shape == (15, 2) and not visible.any()
    assert len(policy.given) == 0


@pytest.mark.parametrize("name", ["CoarseDropout", "XYMasking", "GridDropout"])
def test_holes_in_the_picture_drop_no_point(name: str) -> None:
    arguments = {"num_masks_x": 3, "num_masks_y": 3, "mask_x_length": 20, "mask_y_length": 20}
    policy = transform(name, **arguments if name == "XYMasking" else {})
    work = recipe(policy, jitter=0, views=10)
    image = np.full((140, 140, 1), 200, np.uint8)
    for _, _, visible in augmented_views(example_of(FACE + 20), image, work, policy_of(work)):
        assert visible.all()


def test_a_policy_that_loses_points_is_refused() -> None:
    class Loses(Recording):
        def __call__(self, **targets: np.ndarray) -> Any:
            return super().__call__(image=targets["image"], keypoints=targets["keypoints"][1:])

    work = recipe(())
    with pytest.raises(
        GrimaceError, match=r"dropped keypoints of a: .*augment\.landmarks\.policies\.tried"
    ):
        augmented_views(
            example_of(FACE), np.zeros((99, 99, 1), np.uint8), work, Loses(policy_of(work))
        )


# What decides a view


def test_views_differ_and_depend_on_seed_id_and_copy_alone() -> None:
    work = recipe(DEFAULT.landmarks.policies["modern"], views=3)
    image = np.random.default_rng(0).integers(0, 256, (140, 140, 1), np.uint8)
    policy = policy_of(work)

    def views(id: str = "a", copy: int = 0, recipe: Recipe = work, built: Any = policy) -> Any:
        made = augmented_views(example_of(FACE, id=id), image, recipe, built, copy)
        return [picture.tobytes() for picture, _, _ in made]

    first = views()
    others = [*views(id="b"), *views(copy=1), *views(copy=2), *views(recipe=replace(work, seed=7))]
    assert len({*first, *others}) == 15
    assert views() == first
    assert views(built=policy_of(work)) == first
    more = replace(work, settings=work.settings.model_copy(update={"views": 5}))
    assert views(recipe=more)[:3] == first


def test_transforms_are_drawn_independently() -> None:
    """Each from where the last one left the stream; not all from its start, and so all alike."""
    policy = tuple(Transform(transform=name, p=0.5) for name in ("HorizontalFlip", "VerticalFlip"))
    work = recipe(policy, jitter=0, views=80)
    image = np.zeros((96, 96, 1), np.uint8)
    image[:48, :48] = 255  # where this goes tells what was done
    done = [
        tuple(view[::80, ::80, 0].flat)
        for view, _, _ in augmented_views(Example("a", b""), image, work, policy_of(work))
    ]
    assert len(set(done)) == 4
    assert min(done.count(outcome) for outcome in set(done)) > 8


def test_one_transform_by_itself() -> None:
    task = Task(dataset="synthetic", size=96, channels=1, margin=0.15)
    image = np.random.default_rng(0).integers(0, 256, (140, 140, 1), np.uint8)
    example = example_of(FACE + 20)
    plain = plain_view(example, image, task)
    for transform in DEFAULT.landmarks.policies["modern"]:
        shown = transform_view(example, image, task, "landmarks", transform, seed=3)
        again = transform_view(example, image, task, "landmarks", transform, seed=3)
        assert np.array_equal(shown[0], again[0])
        assert not np.array_equal(shown[0], plain[0]), transform.transform
        moves = is_geometric(transform)
        assert np.allclose(shown[1], plain[1], atol=1e-4) != moves, transform.transform
    with pytest.raises(GrimaceError, match="no transform 'Flop'"):
        transform_view(example, image, task, "landmarks", Transform(transform="Flop"), seed=3)


@pytest.mark.parametrize("task", ["emotion", "landmarks"])
def test_every_policy_of_the_parameters_keeps_every_point(task: Any) -> None:
    settings, crop = DEFAULT.named(task), load_params(ROOT / "params.yaml").tasks.named(task)
    image = np.random.default_rng(0).integers(0, 256, (140, 140, crop.channels), np.uint8)
    for name in settings.policies:
        work = Recipe(task, crop, settings.model_copy(update={"policy": name, "views": 20}), seed=1)
        policy = Recording(policy_of(work))
        for result, _, visible in augmented_views(example_of(FACES[68] + 20), image, work, policy):
            assert result.shape == (crop.size, crop.size, crop.channels)
            assert result.dtype == np.uint8
            assert visible.sum() >= (40 if task == "landmarks" else 0)
        assert len(policy.given) == (20 * (68 + 3) if task == "landmarks" else 0)


@pytest.mark.parametrize("channels", [1, 3])
def test_plain_view(channels: int) -> None:
    task = Task(dataset="synthetic", size=96, channels=channels, margin=0.15)
    points = FACE + 20
    example = example_of(points, np.arange(15) != 4)
    image = np.repeat(dot((140, 140), points[10], 2.0), channels, 2)
    crop, landmarks, visible = plain_view(example, image, task)
    assert crop.shape == (96, 96, channels) and crop.dtype == np.uint8
    assert np.abs(position(crop) - (landmarks[10] * 96 - 0.5)).max() < 0.1
    assert np.array_equal(visible, example.visible) and (landmarks[4] == 0).all()
    assert landmarks.dtype == np.float32
