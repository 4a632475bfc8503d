"""The checks of `filter`, one module a kind, and the finding that all of them give."""

from dataclasses import dataclass

from pipelines.params import Action

# What the pictures and rows themselves show; every other check is an opinion, and an opinion
# drops nothing from an official val or test split.
FACTS = ("defect", "unreadable", "blank", "exact_duplicate")


@dataclass(frozen=True)
class Finding:
    """One reason to act on one example.

    Attributes:
        id: the example.
        check: the check that fired, a field of `pipelines.params.Checks`.
        score, threshold: what was measured and the bound it crossed; NaN where a check has none.
        action: "drop", "flag" or "weight"; "restored" where params bring the example back.
        evidence: in words; names the other example where there is one.
        weight: that training gives the example, for the action "weight"; else 1.
    """

    id: str
    check: str
    score: float
    threshold: float
    action: Action | str
    evidence: str
    weight: float = 1.0
