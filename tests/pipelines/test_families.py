import numpy as np

from pipelines.families import families


def test_persons_and_copies_chain() -> None:
    persons = ["p", "p", "q", "q", "", "", "", "r", ""]
    clusters = ["", "a", "a", "", "b", "b", "", "", ""]
    found = families(persons, clusters)
    assert [found.tolist().index(number) for number in found] == [0, 0, 0, 0, 4, 4, 6, 7, 8]


def test_a_person_is_not_a_cluster_of_the_same_name() -> None:
    assert len(set(families(["x", "", ""], ["", "x", "x"]))) == 2


def test_nobody_and_strangers() -> None:
    assert families([], []).shape == (0,)
    assert len(np.unique(families([""] * 4, [""] * 4))) == 4
