"""Stage `select`: make the model that did best on validation the task's candidate.

The test side is not looked at. Beside the ranking stands how sure the choice is: the interval of
the winner's lead over each other model on the same resamples of the same faces, in `lead_metric`,
whatever metric the models are ranked by.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from shutil import copyfile
from typing import Any

import numpy as np
import pandas as pd

from models.metrics import confusion, emotion_metrics
from models.schemes import EMOTIONS
from pipelines.cli import GrimaceError, run
from pipelines.heldout import Faces, faces_of_shards
from pipelines.measures import DECIDES, bootstrap_weights, landmark_errors
from pipelines.params import Evaluate, SelectTask, load_params


def main() -> None:
    """Rank the task's models and copy the first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", required=True, choices=("emotion", "landmarks"))
    task = parser.parse_args().task
    params = load_params()
    settings = params.select.named(task)

    models = [job.model for job in params.train.jobs.values() if job.task == task]
    ranking = rank(read_scores(task, models), settings)
    winner = str(ranking.iloc[0]["model"])
    faces = faces_of_shards(task, params.tasks.named(task))
    outputs = {
        name: np.load(f"reports/evaluate/{task}/{name}/predictions.npz")["outputs"]
        for name in ranking["model"]
    }
    leads = {
        name: lead(faces, outputs[winner], outputs[name], params.evaluate)
        for name in ranking["model"][1:]
    }
    target = Path("deploy/candidate", f"{task}.keras")
    target.parent.mkdir(parents=True, exist_ok=True)
    copyfile(Path("runs", task, winner, "model.keras"), target)
    report = Path("reports/select", f"{task}.json")
    report.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "task": task,
        "candidate": winner,
        "metric": settings.metric,
        "value": float(ranking.iloc[0][settings.metric]),
        "ranking": ranking.to_dict("records"),
        "lead_metric": DECIDES[task],
        "lead_ci95": leads,
    }
    report.write_text(json.dumps(result, indent=2) + "\n")
    print(ranking.to_string(index=False))


def read_scores(task: str, models: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Read what `evaluate` wrote of a task's models.

    Only of those named: a model that left params.yaml keeps its report, from data as it was then.
    """
    paths = {name: Path("reports/evaluate", task, name, "scores.json") for name in sorted(models)}
    found = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    if not found:
        raise GrimaceError(
            f"reports/evaluate/{task} holds no scores of {', '.join(paths)}; run "
            "`dvc repro evaluate`"
        )
    return found


def rank(scores: dict[str, dict[str, Any]], settings: SelectTask) -> pd.DataFrame:
    """Order models by the deciding metric, best first; equals by name.

    Returns:
        Columns model, the metric, low and high (its 95 % interval), n.

    Raises:
        GrimaceError: the scores have no interval of the metric.
    """
    rows = []
    for model, score in scores.items():
        if settings.metric not in score["ci95"]:
            raise GrimaceError(
                f"params.yaml: select.{score['task']}.metric: {settings.metric!r} is not measured "
                f"with an interval; choose among {', '.join(score['ci95'])}"
            )
        low, high = score["ci95"][settings.metric]
        rows.append((model, score[settings.metric], low, high, score["n"]))
    table = pd.DataFrame(rows, columns=["model", settings.metric, "low", "high", "n"])
    return table.sort_values(
        [settings.metric, "model"], ascending=[not settings.higher_is_better, True]
    ).reset_index(drop=True)


def lead(faces: Faces, winner: np.ndarray, other: np.ndarray, settings: Evaluate) -> list[float]:
    """Return the 95 % interval of winner minus other, on the same resamples.

    In accuracy for emotion, in inter-ocular NME (all labelled points) for landmarks.
    """
    drawn = []
    if faces.emotions is not None:
        for weights in bootstrap_weights(faces.groups, settings):
            first, second = (
                emotion_metrics(
                    confusion(faces.emotions, outputs.argmax(-1), weights, len(EMOTIONS))
                )["accuracy"]
                for outputs in (winner, other)
            )
            drawn.append(first - second)
    else:
        difference = landmark_errors(faces, winner)[0] - landmark_errors(faces, other)[0]
        valid = np.isfinite(difference)
        for weights in bootstrap_weights(faces.groups[valid], settings):
            drawn.append(weights @ difference[valid] / weights.sum(-1))
    low, high = np.percentile(np.concatenate(drawn), [2.5, 97.5])
    return [float(low), float(high)]


if __name__ == "__main__":
    run(main)
