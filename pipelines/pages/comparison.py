"""The page of `compare`: every model of a task on the same faces."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from models.schemes import EMOTIONS
from pipelines import pages
from pipelines.pages import Section, charts

SIDES = {"val": "validation", "test": "test"}
FIGURES = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "balanced_accuracy": "balanced accuracy",
    "ece": "calibration error (ECE)",
    "brier": "Brier score",
    "nll": "log-likelihood, negative",
    "nme_interocular": "NME, inter-ocular",
    "nme_interocular_inner": "NME, inner points",
    "nme_box": "NME, by box",
    "fr10": "failures above 10 %",
    "auc10": "AUC up to 10 %",
    "mae": "MAE, of the crop",
}
NO_FRACTIONS = ("brier", "nll")
FINE = ("nme_interocular", "nme_interocular_inner", "nme_box", "mae")  # small, so a digit more
COSTS = {  # title, unit, how many of the figure's own make one, format
    "parameters": ("parameters", "M", 1e6, "{:.2f} M"),
    "multiply_adds": ("multiply-adds", "M", 1e6, "{:.1f} M"),
    "bytes": ("file", "MiB", 2**20, "{:.2f} MiB"),
    "latency": ("latency", "ms", 1, "{:.2f} ms"),
}
TESTS = {"mcnemar": "p, McNemar", "sign_flip": "p, groups permuted"}
SLICES = {
    "class": "expression",
    "brightness": "brightness",
    "yaw": "head yaw in degrees",
    "face_size": "face size in pixels",
    "source": "source",
}

Result = Mapping[str, Any]


def write_comparison(result: Result) -> str:
    """Put the page together.

    Args:
        result: what `pipelines.compare` writes to compare.json.
    """
    best = result["models"][0]
    side, metric = SIDES[result["side"]], result["metric"]
    low, high = best["ci95"][metric]
    lead = [
        f"{_models(len(result['models']))} for {result['task']}, asked about the same faces: the "
        f"{side} side of {result['dataset']}. Best is {best['name']} with "
        f"{_name(metric)} {best[metric]:.2%} (95 % interval {low:.2%} to {high:.2%}).",
        pages.facts(
            {
                "models": f"{len(result['models'])}",
                "faces": f"{result['n']:,}",
                "people or groups of copies": f"{result['groups']:,}",
                f"best {_name(metric)}": f"{best[metric]:.2%}",
            }
        ),
        pages.command(result["command"]),
    ]
    sections = [
        Section("Models", _overview(result)),
        Section("Differences", _differences(result)),
    ]
    if result["task"] == "emotion":
        sections += [
            Section("Confusion", _confusion(result)),
            Section("Calibration", _calibration(result)),
            Section("Classes", _classes(result)),
        ]
    else:
        sections.append(Section("Error curves", _error_curves(result)))
    sections += [
        Section("Slices", _slices(result)),
        Section("Cost", _cost(result)),
        Section("All figures", _all_figures(result)),
    ]
    if result.get("deployables"):
        sections.append(Section("Deployables", _deployables(result)))
    sections.append(Section("How it was made", _origin(result)))
    return pages.page(f"Models for {result['task']}, {side}", lead, sections)


def _overview(result: Result) -> list[Markup | str]:
    metric, models = result["metric"], result["models"]
    table = pd.DataFrame(
        {
            "model": [_label(model) for model in models],
            _name(metric): [model[metric] for model in models],
            "95 % interval": [_range(model["ci95"][metric]) for model in models],
        }
    )
    formats = {_name(metric): "{:.2%}"}
    for key, (title, _, unit, form) in COSTS.items():
        values = [_cost_of(model, key) for model in models]
        if any(value is not None for value in values):
            table[title] = [np.nan if value is None else value / unit for value in values]
            formats[title] = form
    drawn = pd.DataFrame(
        [(model[metric], *model["ci95"][metric]) for model in models],
        index=[model["name"] for model in models],
        columns=["value", "low", "high"],
    )
    blocks: list[Markup | str] = [
        pages.table(table, f"Best first, by {_name(metric)}", formats),
        charts.intervals(drawn, f"{_title(metric)}, 95 % intervals"),
        pages.note(
            "Intervals are percentiles of a bootstrap in which whole groups are drawn. "
            f"{_better(metric)}"
        ),
    ]
    if any(model["test_time"] != "none" for model in models):
        blocks.append(
            pages.note(
                "Where answers are averaged over mirrored or shifted crops, the model's name says "
                "so; what is deployed answers one crop."
            )
        )
    return blocks


def _differences(result: Result) -> list[Markup | str]:
    metric, (best, *rest) = result["metric"], result["models"]
    if not rest:
        return ["There is only one model."]
    # Where every face is its own group, the two tests of emotion ask the same.
    tests = [
        test
        for test in TESTS
        if test in rest[0]["against_best"]["p"]
        and (test == "mcnemar" or metric != "accuracy" or result["groups"] < result["n"])
    ]
    rows = []
    for model in rest:
        against = model["against_best"]
        low, high = (f"{100 * bound:+.2f}".replace("-", "−") for bound in against["ci95"])
        row = {
            "model": _label(model),
            "difference": 100 * against["difference"],
            "95 % interval": f"{low} to {high}",
        }
        for test in tests:
            row[TESTS[test]] = f"{_p(against['p'][test])}\nHolm {_p(against['p_holm'][test])}"
        rows.append(row)
    said = {
        "mcnemar": "McNemar's test is exact and takes faces for independent of each other.",
        "sign_flip": "In the permutation test the two models change places in whole groups, since "
        "frames of one person or copies of one picture are no independent evidence"
        + ("; where groups hold several faces, rely on this one." if len(tests) > 1 else "."),
    }
    return [
        f"Each model minus the best, {best['name']}, on the same faces, in points of a hundred of "
        f"{_name(metric)}. {_better(metric)}",
        pages.table(
            pd.DataFrame(rows), "Paired differences to the best", {"difference": "{:+.2f}"}
        ),
        pages.note(
            " ".join(said[test] for test in tests)
            + " Tests are two-sided; Holm's correction is for the number of models on this page. "
            "The best was chosen on these very faces, which flatters it a little."
        ),
    ]


def _confusion(result: Result) -> list[Markup | str]:
    drawn = [
        charts.confusion(np.array(model["confusion"]), EMOTIONS, model["name"])
        for model in result["models"]
    ]
    return [
        "Per cent of each true class, by what was answered.",
        pages.side_by_side(*drawn),
    ]


def _calibration(result: Result) -> list[Markup | str]:
    drawn = [
        charts.reliability(
            pd.DataFrame(model["reliability"]), f"{model['name']}, ECE {model['ece']:.1%}"
        )
        for model in result["models"]
    ]
    return [
        "How often a model is right when it is so sure (dots), and of what share of the faces it "
        "is so sure (bars). On the diagonal its probabilities can be taken at their word; below "
        "it, it is too sure.",
        pages.side_by_side(*drawn),
        pages.note(
            "Expected calibration error over 15 bins of equal width, by the probability of the "
            "class answered (Guo et al. 2017)."
        ),
    ]


def _classes(result: Result) -> list[Markup | str]:
    models = result["models"]
    blocks: list[Markup | str] = []
    for figure in ("recall", "precision", "f1"):
        columns = {
            f"{emotion} ({models[0]['per_class'][emotion]['n']:,})": [
                _with_interval(row[figure], (row["ci95"] or {}).get(figure))
                for row in (model["per_class"][emotion] for model in models)
            ]
            for emotion in EMOTIONS
        }
        table = pd.DataFrame({"model": [_label(model) for model in models], **columns})
        caption = f"{figure.capitalize()} by class (how many faces), with 95 % intervals"
        blocks.append(pages.table(table, caption))
    return [*blocks, _FEW]


def _error_curves(result: Result) -> list[Markup | str]:
    lines = {
        model["name"]: (np.array(model["ced"]["thresholds"]), np.array(model["ced"]["shares"]))
        for model in result["models"]
    }
    return [
        "The share of faces whose error does not exceed a bound; the higher a curve, the better.",
        charts.curves(
            lines, "Cumulative error distribution", "inter-ocular NME", "faces", mark=0.1
        ),
    ]


def _slices(result: Result) -> list[Markup | str]:
    models, metric = result["models"], result["metric"]
    blocks: list[Markup | str] = []
    for column, title in SLICES.items():
        bins = models[0]["slices"].get(column, {})
        if len(bins) < 2 or (column == "class" and metric == "accuracy"):  # which is recall
            continue
        columns = {
            f"{name} ({row['n']:,})": [
                _with_interval(mine[metric], (mine["ci95"] or {}).get(metric), metric)
                for mine in (model["slices"][column][name] for model in models)
            ]
            for name, row in bins.items()
        }
        table = pd.DataFrame({"model": [_label(model) for model in models], **columns})
        caption = f"{_title(metric)} by {title} (how many faces), with 95 % intervals"
        blocks.append(pages.table(table, caption))
    return [*blocks, _FEW] if blocks else ["All faces lie in one part."]


def _cost(result: Result) -> list[Markup | str]:
    metric, models = result["metric"], result["models"]
    drawn, known = [], []
    for key, (title, unit, many, _) in COSTS.items():
        rows = {
            model["name"]: (value / many, model[metric], *model["ci95"][metric])
            for model in models
            if (value := _cost_of(model, key))
        }
        if rows:
            points = pd.DataFrame.from_dict(rows, "index", columns=["x", "y", "low", "high"])
            known.append(key)
            drawn.append(charts.trade_off(points, f"By {title}", f"{title}, {unit}", _name(metric)))
    blocks: list[Markup | str] = [pages.side_by_side(*drawn)] if drawn else ["Nothing is known."]
    said = ["Multiply-adds are of one image."] if "multiply_adds" in known else []
    if "latency" in result:
        how = result["latency"]
        said.append(
            f"Latency is the median over {how['images']} single images in {how['runtime']}, "
            f"threads: {how['threads']}, all models by turns in one run on the machine below, "
            f"whose load average was {how['load_average']} when it began."
        )
    else:
        said.append(
            "Latency was not measured for this page; --latency litert does, in some seconds a "
            "model."
        )
    said += [
        f"{model['name']} could not be timed: {model['latency']['failed']}."
        for model in models
        if "failed" in model.get("latency", {})
    ]
    return [*blocks, pages.note(" ".join(said))]


def _all_figures(result: Result) -> list[Markup | str]:
    models = result["models"]
    names = [name for name in FIGURES if name in models[0]]
    table = pd.DataFrame(
        {
            "model": [_label(model) for model in models],
            **{
                FIGURES[name]: [
                    _with_interval(model[name], model["ci95"][name], name) for model in models
                ]
                for name in names
            },
        }
    )
    return [pages.table(table, "All figures with 95 % intervals")]


def _deployables(result: Result) -> list[Markup | str]:
    found, metric = result["deployables"], result["metric"]
    unit = "points lost" if metric == "accuracy" else "change of the NME"
    table = pd.DataFrame(
        {
            "deployable": [row["name"] for row in found["rows"]],
            "runs in": [row["runtime"] for row in found["rows"]],
            f"{_name(metric)}, test": [
                _with_interval(row["metric"], row["ci95"], metric) for row in found["rows"]
            ],
            unit: [row["loss"] for row in found["rows"]],
            "size": [row["bytes"] / 2**20 for row in found["rows"]],
            "latency": [row["p50_ms"] for row in found["rows"]],
        }
    )
    formats = {
        unit: "{:+.2f}" if metric == "accuracy" else "{:+.2%}",
        "size": "{:.2f} MiB",
        "latency": "{:.2f} ms",
    }
    return [
        f"What was exported of the candidate, {found['candidate']}, as verify last measured it: "
        "on the test side, each in its own runtime, one thread, median latency of single images.",
        pages.table(table, "Deployables of the candidate, on test", formats),
    ]


def _origin(result: Result) -> list[Markup | str]:
    facts = {
        "date": result["date"],
        "data version": result["data_version"],
        **result["machine"],
    }
    for model in result["models"]:
        key = f"answers {model['answers']}"
        facts[key] = f"{facts[key]}, {model['name']}" if key in facts else model["name"]
    return [pages.table(pd.DataFrame(facts.items(), columns=["what", "value"]), "Circumstances")]


def _models(count: int) -> str:
    return "One model" if count == 1 else f"{count} models"


def _name(metric: str) -> str:
    return "accuracy" if metric == "accuracy" else "NME"


def _title(metric: str) -> str:
    return _name(metric)[0].upper() + _name(metric)[1:]


def _better(metric: str) -> str:
    return "Higher is better." if metric == "accuracy" else "Lower is better."


def _label(model: Result) -> str:
    how = model["test_time"]
    return model["name"] + ("" if how == "none" else f"\naveraged: {how.replace('_', ' ')}")


def _cost_of(model: Result, key: str) -> float | None:
    if key == "latency":
        return model.get("latency", {}).get("p50_ms")
    return model["cost"].get(key)


def _range(bounds: list[float]) -> str:
    low, high = bounds
    return f"{100 * low:.2f} – {high:.2%}"


def _with_interval(
    value: float | None, bounds: list[float] | None, metric: str = "accuracy"
) -> str:
    if value is None:
        return "–"
    if metric in NO_FRACTIONS:
        return f"{value:.3f}" + (f"\n{bounds[0]:.3f} – {bounds[1]:.3f}" if bounds else "")
    digits = 2 if metric in FINE else 1
    text = f"{value:.{digits}%}"
    if bounds:
        text += f"\n{100 * bounds[0]:.{digits}f} – {bounds[1]:.{digits}%}"
    return text


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


_FEW = pages.note("No interval is given where the faces are fewer than ten pieces of evidence.")
