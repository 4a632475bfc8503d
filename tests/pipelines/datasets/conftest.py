"""Labels as the makers of 300W-LP and AFLW2000-3D write them."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from scipy.io import savemat

SIDE = 450  # pixels of every picture in both sets


@pytest.fixture
def mat() -> Callable[..., bytes]:
    def write(**arrays: np.ndarray) -> bytes:
        file = io.BytesIO()
        savemat(file, arrays)
        return file.getvalue()

    return write


@pytest.fixture
def fitted() -> Callable[..., dict[str, np.ndarray]]:
    """A face model turned by angles in degrees and projected as the makers' MATLAB does it."""

    def fit(pitch: float = 0.0, yaw: float = 0.0, roll: float = 0.0) -> dict[str, np.ndarray]:
        phi, gamma, theta = np.radians([pitch, yaw, roll])
        about_x = [[1, 0, 0], [0, np.cos(phi), np.sin(phi)], [0, -np.sin(phi), np.cos(phi)]]
        about_y = [
            [np.cos(gamma), 0, -np.sin(gamma)],
            [0, 1, 0],
            [np.sin(gamma), 0, np.cos(gamma)],
        ]
        about_z = [
            [np.cos(theta), np.sin(theta), 0],
            [-np.sin(theta), np.cos(theta), 0],
            [0, 0, 1],
        ]
        rotation = np.array(about_x) @ np.array(about_y) @ np.array(about_z)
        scale, shift = 1.5, np.array([[225.0], [225.0], [0.0]])
        vertices = scale * rotation @ _model() + shift
        vertices[1] = SIDE + 1 - vertices[1]  # rows count from 1, from the top
        return {
            "pt3d_68": vertices,
            "Pose_Para": np.array([[phi, gamma, theta, *shift[:, 0], scale]]),
            "Shape_Para": np.zeros((199, 1)),
            "Exp_Para": np.zeros((29, 1)),
            "Illum_Para": np.zeros((1, 10)),
            "Color_Para": np.ones((1, 7)),
            "Tex_Para": np.zeros((199, 1)),
            "roi": np.array([[100, 90, 549, 539]]),
        }

    return fit


def _model() -> np.ndarray:
    """(3, 68): x to the image's right, y up, z towards the viewer; three points mean something."""
    points = np.random.default_rng(3).uniform(-60, 60, (3, 68))
    points[2] = 0
    points[:, 30] = 0, 0, 50  # tip of the nose
    points[:, 27] = 0, 45, 20  # between the eyes
    points[:, 8] = 0, -70, 10  # chin
    return points
