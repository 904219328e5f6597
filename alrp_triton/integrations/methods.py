"""Methods of an object that others stand in for, and back."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any


def put_in(owner: Any, methods: Mapping[str, Callable[..., Any]]) -> dict[str, Any]:
    """Sets methods on an object; returns those of these names that its user had set on it, for :func:`take_out`."""
    former = {name: vars(owner)[name] for name in methods if name in vars(owner)}
    for name, method in methods.items():
        setattr(owner, name, method)
    return former


def take_out(owner: Any, names: Iterable[str], former: Mapping[str, Any]) -> None:
    """Gives an object the methods of its class back, or those that its user had set."""
    for name in names:
        delattr(owner, name)
    for name, method in former.items():
        setattr(owner, name, method)
