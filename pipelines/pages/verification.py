"""The page of `verify`: what the deployables of a task cost and what they lose."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from pipelines import pages
from pipelines.pages import Section, charts

METRICS = {"emotion": ("accuracy", "accuracy"), "landmarks": ("nme_interocular", "NME")}

Rows = Mapping[str, dict[str, Any]]


def write_verification(
    test: dict[str, Any], numerics: Rows, perf: Rows, budgets: dict[str, Any], made: Rows
) -> str:
    """Put the page together.

    Args:
        test: figures of the Keras model, as in test.json.
        numerics: figures by deployable, as in numerics.json.
        perf: costs by deployable, as in perf.json.
        budgets: the verdict, as in budgets.json.
        made: by deployable what the manifest says of it.
    """
    task = test["task"]
    key, name = METRICS[task]
    low, high = test["ci95"][key]
    passed = sum(gate["passed"] for gate in budgets["gates"])
    lead = [
        f"The candidate for {task} and what was exported of it, each in its own runtimes on all "
        f"{test['n']:,} faces of the test side. In Keras and float32 its {name} is "
        f"{test[key]:.2%} (95 % interval {low:.2%} to {high:.2%}).",
        pages.facts(
            {
                "faces": f"{test['n']:,}",
                f"{name}, Keras": f"{test[key]:.2%}",
                "deployables within budget": f"{passed} of {len(budgets['gates'])}",
                "all of them": "yes" if budgets["passed"] else "no",
            }
        ),
    ]
    sections = [
        Section("What is lost", _losses(task, numerics, perf, budgets)),
        Section(f"{name} against cost", _trade_offs(task, numerics, perf)),
        Section("Cost", _costs(perf, budgets)),
        Section("Not measured here", _not_measured(budgets)),
        Section("Layers left in float", _float_layers(made)),
        Section("Gates", _gates(budgets)),
    ]
    return pages.page(f"Deployables for {task}, test", lead, sections)


def _losses(task: str, numerics: Rows, perf: Rows, budgets: dict[str, Any]) -> list[Markup | str]:
    key, name = METRICS[task]
    emotion = task == "emotion"
    unit = "points lost" if emotion else "change of the NME"
    verdicts = {gate["name"]: gate["passed"] for gate in budgets["gates"]}
    rows = []
    for label, row in numerics.items():
        low, high = row["loss_ci95"]
        interval = f"{low:+.2f} to {high:+.2f}" if emotion else f"{low:+.2%} to {high:+.2%}"
        figures = {
            "deployable": f"{label}, software, {row['n']} faces"
            if perf[label]["software"]
            else label,
            name: row[key],
            "95 % interval": "{:.2%} – {:.2%}".format(*row["ci95"][key]),
            unit: row["loss"],
            "its 95 % interval": interval.replace("-", "−"),
        }
        if emotion:
            figures["same decision"] = row["agreement"]
        else:
            middle, high = row["agreement"]
            figures |= {"points apart, median": middle, "95 % of faces within": high}
        figures |= {
            "largest difference": row["max_difference"],
            "golden, off by": row["golden"]["difference"],
            "verdict": {True: "ok", False: "FAILED", None: "not judged"}[verdicts.get(label)],
        }
        rows.append(figures)
    if not rows:
        return ["None could be measured."]
    formats = {
        name: "{:.2%}",
        unit: "{:+.2f}" if emotion else "{:+.2%}",
        "same decision": "{:.1%}",
        "points apart, median": "{:.3%}",
        "95 % of faces within": "{:.3%}",
        "largest difference": "{:.2g}",
        "golden, off by": "{:.1g}",
    }
    return [
        pages.table(pd.DataFrame(rows), "Against the Keras model on the same faces", formats),
        pages.note(
            "The interval of what is lost is of the difference, both models on the same resamples "
            "of whole groups. Differences are of outputs: probabilities, or crop coordinates. What "
            "points are apart is a share of the distance between the eyes, a mean over each face. "
            "Golden images are drawn faces whose answers the bundle carries. A browser without a "
            "GPU imitates one in software: that is slow, so it has some of the faces alone, evenly "
            "spaced, and is not judged."
        ),
    ]


def _trade_offs(task: str, numerics: Rows, perf: Rows) -> list[Markup | str]:
    key, name = METRICS[task]
    drawn = []
    costs = (("p50_ms", "latency, one thread", "ms", 1), ("bytes", "size", "MiB", 2**20))
    for cost, title, unit, many in costs:
        rows = {
            label: (perf[label][cost] / many, row[key], *row["ci95"][key])
            for label, row in numerics.items()
            if ":" not in label  # each graph once, in the first of its runtimes
        }
        if rows:
            points = pd.DataFrame.from_dict(rows, "index", columns=["x", "y", "low", "high"])
            drawn.append(charts.trade_off(points, f"By {title}", f"{title}, {unit}", name))
    return [pages.side_by_side(*drawn)] if drawn else ["Nothing was measured."]


def _costs(perf: Rows, budgets: dict[str, Any]) -> list[Markup | str]:
    rows = []
    for label, row in perf.items():
        many = row.get("all_threads", {})
        rows.append(
            {
                "deployable": label,
                "runs in": row["runtime"],
                "size": row["bytes"] / 2**20,
                "load": row["load_ms"],
                "memory": row["memory_mib"],
                "p50": row["p50_ms"],
                "p95": row["p95_ms"],
                "threads": many.get("threads", np.nan),
                "p50 on these": many.get("p50_ms", np.nan),
                "p95 on these": many.get("p95_ms", np.nan),
            }
        )
    if not rows:
        return ["Nothing was measured."]
    formats = {"size": "{:.2f} MiB", "memory": "{:.1f} MiB", "threads": "{:.0f}"}
    formats |= dict.fromkeys(("load", "p50", "p95", "p50 on these", "p95 on these"), "{:.2f} ms")
    unrun = ", ".join(
        f"{name} ({size / 2**20:.2f} MiB)" for name, size in budgets["built_but_not_run"].items()
    )
    return [
        pages.table(pd.DataFrame(rows), "Single images on this machine", formats),
        pages.note(
            "Loading ends with the first answer, in a fresh process whose growth is the memory; "
            "TF.js and LiteRT.js tell both themselves, their memory being that of tensors and that "
            "of WebAssembly as a whole; of a TensorRT engine it is the GPU's. p50 and p95 are the "
            "median and the 95th percentile of single images, one thread."
            + (f" Built but not run, see below: {unrun}." if unrun else "")
        ),
    ]


def _not_measured(budgets: dict[str, Any]) -> list[Markup | str]:
    absent = {name: f"not available here: {why}" for name, why in budgets["not_available"].items()}
    for name in budgets["left_out"]:
        target, _, runtime = name.partition(":")
        absent[name] = f"left out; add {runtime} to verify.runtimes.{target} in params.yaml"
    if not absent:
        return ["Every runtime that there is was measured."]
    table = pd.DataFrame({"runtime": absent.keys(), "why": absent.values()})
    return [pages.table(table, "Runtimes without a row above")]


def _float_layers(made: Rows) -> list[Markup | str]:
    blocks: list[Markup | str] = []
    for label, facts in made.items():
        found = facts.get("quantisation")
        if not found:
            continue
        kept, unit = found["float_layers"], found["unit"]
        said = (
            f"{label}: all {found['layers']} layers in eight bits lose "
            f"{found['loss_all_int8']:.4f} {unit} on validation, {found['bound']:.4f} aimed at; "
            f"with {len(kept)} of them in float it is {found['loss']:.4f}."
        )
        blocks.append(said)
        if kept:
            steps = found["steps"]
            table = pd.DataFrame(
                {
                    "layers": [
                        ", ".join(layer.split(";")[0] for layer in step["layers"]) for step in steps
                    ],
                    "movement left": [step["moved"] for step in steps],
                    "loss left": [step["loss"] for step in steps],
                }
            )
            blocks.append(pages.table(table, f"{label}: left in float, in this order"))
    return blocks or ["No deployable was searched."]


def _gates(budgets: dict[str, Any]) -> list[Markup | str]:
    table = pd.DataFrame(
        {
            "deployable": [gate["name"] for gate in budgets["gates"]],
            "passed": ["yes" if gate["passed"] else "NO" for gate in budgets["gates"]],
            "why": [gate["why"] for gate in budgets["gates"]],
        }
    )
    return [pages.table(table, "One row a deployable")]
