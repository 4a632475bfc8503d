"""Which examples hang together, by showing one person or copies of one picture."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components


def families(persons: Sequence[str], clusters: Sequence[str]) -> np.ndarray:
    """Number the families: examples joined by a person or a cluster of copies, or by a chain.

    A copy of somebody's picture shows that person too, whatever else it is said to show; so what
    is known of one member can give another away.

    Args:
        persons: n keys, "" where unknown.
        clusters: n keys, "" where there is no copy.

    Returns:
        int (n,); equal numbers are one family.
    """
    n = len(persons)
    ties = [
        (row, (kind, key))
        for kind, keys in enumerate((persons, clusters))
        for row, key in enumerate(keys)
        if key
    ]
    rows = [row for row, _ in ties]
    codes, distinct = pd.factorize(pd.Series([tie for _, tie in ties], dtype=object))
    size = n + len(distinct)
    graph = coo_array((np.ones(len(rows), bool), (rows, n + codes)), shape=(size, size))
    return connected_components(graph, directed=False)[1][:n]
