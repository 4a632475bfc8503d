"""What the pixels alone say: contrast, brightness, information, sharpness."""

import cv2
import numpy as np
import pandas as pd
from cleanvision.issue_managers.image_property import (
    BlurrinessProperty,
    BrightnessProperty,
    EntropyProperty,
)
from cleanvision.utils.constants import MAX_RESOLUTION_FOR_BLURRY_DETECTION
from PIL import Image

# As CleanVision's own issue manager sets them.
INFORMATION = {"normalizing_factor": 0.1}
BLUR = {"normalizing_factor": 0.01, "color_threshold": 0.18}

# What the scores are made from.
RAW = (
    "brightness_perc_5",
    "brightness_perc_99",
    "entropy",
    "blurriness",
    "blurriness_grayscale_std",
)

# CleanVision reduces a picture to this before it judges its sharpness; brightness and information
# show as well there.
SIDE = MAX_RESOLUTION_FOR_BLURRY_DETECTION


def measure_image(rgb: np.ndarray) -> dict[str, float]:
    """Measure one picture by CleanVision's functions; `score_images` turns that into scores.

    Args:
        rgb: uint8 (H, W, 3).

    Returns:
        `std` (standard deviation of the most varied channel, 0-255), `brightness` (mean, 0-1),
        and the raw values behind the scores.
    """
    shrink = SIDE / max(rgb.shape)
    small = rgb
    if shrink < 1:
        height, width = rgb.shape[:2]
        size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
        small = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)
    picture = Image.fromarray(small)
    grey = picture.convert("L")  # its entropy does not depend on how a grey picture was stored
    raw = BrightnessProperty("dark").calculate(picture)
    raw |= EntropyProperty().calculate(grey) | BlurrinessProperty().calculate(grey)
    measures = {name: float(raw[name]) for name in ("brightness", *RAW)}
    return {"std": float(cv2.meanStdDev(rgb)[1].max())} | measures


def score_images(raw: pd.DataFrame) -> pd.DataFrame:
    """Turn CleanVision's raw values into its scores.

    Args:
        raw: one row a picture, as `measure_image` gives them.

    Returns:
        The same rows: `dark` (brightness of the 99th percentile, 0-1; low is dark), `bright`
        (of the 5th; high is bright), `low_information` and `blurred` (0 bad to 1 good).
    """
    blur = BlurrinessProperty().get_scores(raw, "blurry", **BLUR)
    entropy = EntropyProperty().get_scores(raw, "low_information", **INFORMATION)
    return pd.DataFrame(
        {
            "dark": raw["brightness_perc_99"],
            "bright": raw["brightness_perc_5"],
            "low_information": entropy["low_information_score"],
            "blurred": blur["blurry_score"],
        }
    )
