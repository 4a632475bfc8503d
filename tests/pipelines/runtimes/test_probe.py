import numpy as np

from pipelines.runtimes.probe import probe


def test_the_memory_is_the_models_own(mean_models) -> None:
    """A process that starts it from half a gigabyte does not count."""
    ballast = np.ones(2**26)
    found = probe(mean_models / "mean.tflite")
    assert 0 < found["memory_mib"] < ballast.nbytes / 2**20 / 4
    assert found["load_ms"] > 0
