"""Finds are counted against labelled faces: on drawn ones, by the real detector."""

from benchmarks import detection
from pipelines.crops import decode
from pipelines.datasets import synthetic


def test_faces_and_other_finds_are_told_apart() -> None:
    frames = [(decode(row.image, 3), row.landmarks) for row in synthetic.examples(48, 3)]
    large = [detection.enlarged(*frame) for frame in frames[:6]]
    found, others = detection.count(large)
    assert found >= 4
    nowhere = [(image, [faces[0] + 1000]) for image, faces in large]
    assert detection.count(nowhere)[0] == 0 and detection.count(nowhere)[1] >= found + others
    (whole, faces), *more = detection.mosaics(frames)
    assert not more and len(faces) == 48
    assert whole.shape == (detection.ROWS * detection.CELL, detection.COLUMNS * detection.CELL, 3)
    assert faces[-1][:, 0].mean() > 7 * detection.CELL > faces[0].max()
