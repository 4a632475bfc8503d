"""Asking for a network by its name, the same for every task."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import keras


def construct(
    networks: Mapping[str, Callable[..., keras.KerasTensor]], network: str, **asked: Any
) -> keras.KerasTensor:
    """Call the builder of a network with those of the arguments it takes.

    A builder that takes no `widths` has a fixed shape; one that takes no `weights` has no
    pretrained part.

    Args:
        networks: builders by name.
        network: the name asked for.
        asked: what builders may take, `widths` and `weights` among them.

    Returns:
        What the builder returns.

    Raises:
        ValueError: the name is unknown; `widths` are given to a network of fixed shape, or are
            missing; `weights` are given to a network without a pretrained part.
    """
    if network not in networks:
        raise ValueError(f"there is no network {network!r}; there are {', '.join(networks)}")
    takes = inspect.signature(networks[network]).parameters
    widths, weights = tuple(asked["widths"]), asked["weights"]
    if widths and "widths" not in takes:
        raise ValueError(f"{network} has a fixed shape: `widths` must be (), not {widths}")
    if not widths and "widths" in takes:
        raise ValueError(f"{network} needs `widths`; its docstring recommends some")
    if weights is not None and "weights" not in takes:
        raise ValueError(f"{network} has no pretrained part: `weights` must be None")
    return networks[network](**{name: value for name, value in asked.items() if name in takes})
