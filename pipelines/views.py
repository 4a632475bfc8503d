"""One example as a model sees it: cropped, and for training jittered and augmented.

The views of an example are drawn one after the other from a seed made of the recipe's seed, the
example's id and the copy's number, so nothing else changes them.
"""

import hashlib
import random
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.schemes import SCHEMES
from pipelines.cli import GrimaceError
from pipelines.crops import crop, face_box, jitter_box, to_crop
from pipelines.datasets.example import Box, Example
from pipelines.params import AugmentTask, Task, TaskName, Transform, meant

# Rotations and perspectives are drawn on a crop this much wider and trimmed afterwards, so that
# their corners show the picture's surroundings rather than a repeated edge.
CONTEXT = 1 / 8

# A triangle that travels with the landmarks: when its orientation turns, the picture was mirrored
# and left and right points must swap names, whichever transform did it.
PROBE = np.array([[0.4, 0.4], [0.6, 0.4], [0.4, 0.6]])


@dataclass(frozen=True)
class Recipe:
    """All that views follow from, besides the example.

    Attributes:
        name: of the task.
        task: crop size and margin.
        settings: jitter, policy, number of views.
        seed: of all draws.
    """

    name: TaskName
    task: Task
    settings: AugmentTask
    seed: int


def plain_view(
    example: Example, image: np.ndarray, task: Task
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Crop an example without augmentation, as validation, test and deployment do.

    Args:
        example: with landmarks in pixels.
        image: its decoded picture, uint8 (H, W, C).
        task: crop size and margin.

    Returns:
        The crop uint8 (S, S, C), landmarks float32 (N, 2) in crop coordinates (0 where not
        visible), visible bool (N,).
    """
    box = face_box(example, image.shape, task.margin)
    points = np.where(example.visible[:, None], to_crop(example.landmarks, box), 0)
    return crop(image, box, task.size), points.astype(np.float32), example.visible


def augmented_views(
    example: Example, image: np.ndarray, recipe: Recipe, policy: Any, copy: int = 0
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Jitter the face box, crop with some context, apply the policy and trim the context; often.

    Landmarks stay on their pixels; a mirrored picture swaps left and right names; a point that
    leaves the crop becomes invisible and 0, none is lost or reordered. For task emotion points are
    not followed: all become invisible.

    Args:
        example: with landmarks in pixels.
        image: its decoded picture, uint8 (H, W, C).
        recipe: crop, jitter, number of views and seed.
        policy: as `build_policy` makes it.
        copy: makes the views differ from those of other copies.

    Returns:
        One item a view, as `plain_view` gives it.

    Raises:
        GrimaceError: the policy drops points.
    """
    rng = _restart(policy, seed_of(recipe.seed, example.id, copy))
    settings, size, wide_size = recipe.settings, recipe.task.size, _wide(recipe.task.size)
    face = face_box(example, image.shape, recipe.task.margin)
    labelled = np.flatnonzero(example.visible if recipe.name == "landmarks" else [])
    unplaced = np.zeros_like(example.landmarks), np.zeros_like(example.visible)
    views = []
    for _ in range(settings.views):
        tight = jitter_box(face, settings.jitter_shift, settings.jitter_scale, rng)
        extra = (tight.right - tight.left) * (wide_size - size) / size / 2
        box = Box(tight.left - extra, tight.top - extra, tight.right + extra, tight.bottom + extra)
        wide = crop(image, box, wide_size)
        if not len(labelled):
            for transform in policy.transforms:  # what the policy does besides is for points
                wide = transform(image=wide)["image"]
            views.append((wide.reshape(size, size, -1), *unplaced))
            continue
        points = np.concatenate([PROBE, to_crop(example.landmarks[labelled], box)])
        result = policy(image=wide, keypoints=points * wide_size - 0.5)
        moved = (np.asarray(result["keypoints"], np.float32) + 0.5) / size
        if len(moved) != len(points):
            raise GrimaceError(
                f"the policy dropped keypoints of {example.id}: a transform in augment."
                f"{recipe.name}.policies.{settings.policy} removes points; choose another"
            )
        probe, moved = moved[:3], moved[3:]
        inside = ((moved >= 0) & (moved <= 1)).all(1)
        landmarks, visible = (array.copy() for array in unplaced)
        landmarks[labelled[inside]], visible[labelled[inside]] = moved[inside], True
        if _turned(probe):
            mirror = list(SCHEMES[len(landmarks)].mirror)
            landmarks, visible = landmarks[mirror], visible[mirror]
        views.append((result["image"].reshape(size, size, -1), landmarks, visible))
    return views


def _turned(probe: np.ndarray) -> bool:
    (x, y), (x_right, y_right), (x_below, y_below) = probe.tolist()
    return (x_right - x) * (y_below - y) < (x_below - x) * (y_right - y)


def transform_view(
    example: Example, image: np.ndarray, task: Task, name: TaskName, transform: Transform, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Show what one transform of a policy does by itself, always applied, without jitter.

    Args:
        example: with landmarks in pixels.
        image: its decoded picture, uint8 (H, W, C).
        task: crop size and margin.
        name: of the task.
        transform: as it stands in `augment.TASK.policies`.
        seed: draws its strength.

    Returns:
        As `plain_view`.

    Raises:
        GrimaceError: as `build_policy` does.
    """
    always = Transform(**transform.model_dump() | {"p": 1.0})
    settings = AugmentTask(
        views=1, jitter_shift=0, jitter_scale=0, policies={"one": (always,)}, policy="one"
    )
    recipe = Recipe(name, task, settings, seed)
    return augmented_views(example, image, recipe, build_policy(settings, task, name))[0]


def build_policy(settings: AugmentTask, task: Task, name: TaskName) -> Any:
    """Make the albumentations pipeline in use, which takes a wide crop and trims it at its end.

    Each transform is tried on an empty picture, so that one that cannot work is named before any
    work.

    Raises:
        GrimaceError: a transform that albumentations does not have, arguments it rejects, or a
            result that is no picture for the task (other type or channels, too small).
    """
    import albumentations

    transforms = []
    trial = np.zeros((_wide(task.size), _wide(task.size), task.channels), np.uint8)
    for position, item in enumerate(settings.transforms):
        where = f"params.yaml: augment.{name}.policies.{settings.policy}.{position}"
        kind = getattr(albumentations, item.transform, None)
        if not (isinstance(kind, type) and issubclass(kind, albumentations.BasicTransform)):
            raise GrimaceError(
                f"{where}.transform: albumentations {albumentations.__version__} has no "
                f"transform {item.transform!r}{meant(item.transform, dir(albumentations))}"
            )
        known = kind.InitSchema.model_fields if hasattr(kind, "InitSchema") else {}
        for argument in item.arguments:
            if known and argument not in {*known, "p"}:
                raise GrimaceError(
                    f"{where}.{argument}: unknown argument of {item.transform}; it takes "
                    f"{', '.join(sorted({*known, 'p'} - {'strict'}))}"
                )
        try:
            transforms.append(kind(**item.arguments))
            trial = kind(**item.arguments | {"p": 1.0})(image=trial)["image"]
        # Whatever albumentations' own checks and filters raise.
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise GrimaceError(f"{where}: {item.transform} fails: {reason}") from None
        height, width, channels = trial.shape
        if min(height, width) < task.size or channels != task.channels or trial.dtype != np.uint8:
            raise GrimaceError(
                f"{where}: {item.transform} makes {trial.dtype} {trial.shape} of the crop, which "
                f"must stay uint8 with {task.channels} channels and at least {task.size} pixels"
            )
    transforms.append(albumentations.CenterCrop(task.size, task.size))
    keypoints = albumentations.KeypointParams(format="xy", remove_invisible=False)
    policy = albumentations.Compose(transforms, keypoint_params=keypoints, is_check_shapes=False)
    # One stream for all transforms: `set_random_seed` would start each from the same number, so
    # that what is mirrored would always be rotated too.
    policy.set_random_state(np.random.default_rng(0), random.Random(0))
    return policy


def _wide(size: int) -> int:
    return size + 2 * round(size * CONTEXT)


def seed_of(seed: int, id: str, copy: int) -> int:
    """Return 256 bits that each of the arguments changes."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{id}/{copy}".encode()).digest(), "big")


def _restart(policy: Any, seed: int) -> np.random.Generator:
    """Start a policy's random numbers anew and return their generator.

    The state of PCG64 is set as it is, and not through NumPy's own seeding, which takes longer
    and only spreads bits that are well spread already.
    """
    policy.py_random.seed(seed)
    state = {"state": seed >> 128, "inc": seed % 2**128 | 1}
    whole = {"bit_generator": "PCG64", "state": state, "has_uint32": 0, "uinteger": 0}
    policy.random_generator.bit_generator.state = whole
    return policy.random_generator
