from pathlib import Path

import numpy as np

from pipelines import plots
from pipelines.heldout import Faces
from pipelines.params import load_params

SETTINGS = load_params(Path(__file__).parents[2] / "params.yaml").evaluate


def test_gallery_shows_the_worst_first(monkeypatch, tmp_path):
    shown = []
    monkeypatch.setattr(plots, "contact_sheet", lambda *given, **_: shown.append(given))
    truth = np.zeros(5, int)
    outputs = np.full((5, 7), 0.01)
    outputs[:, 0] = [0.9, 0.1, 0.5, 0.2, 0.7]
    ids = np.array([f"id-{number}" for number in range(5)])
    faces = Faces(ids, ids, np.zeros((5, 2, 2, 1), np.uint8), truth, None, None, {})
    settings = SETTINGS.model_copy(update={"gallery": 3})
    plots.write_plots(faces, outputs, settings, tmp_path, "title")
    ((images, captions, _, _),) = shown
    assert [caption.splitlines()[1] for caption in captions] == ["id-1", "id-3", "id-2"]
    assert len(images) == 3
