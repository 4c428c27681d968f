"""How torch's CUDA allocator is set before torch is imported, and who has the last word."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from importlib.metadata import PackageNotFoundError, version

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Where torch reads the settings of its allocator from; the first has had effect since 2.11 only
(2.9 ignores it without a word), and the second is deprecated from there on."""
EXPANDABLE = "expandable_segments:True"


def prefer_expandable_segments(variables: MutableMapping[str, str]) -> None:
    """Let the CUDA allocator grow its segments, unless the user has set anything of it.

    Batches of ever other widths leave holes in segments of a fixed size, so that memory runs out
    while some is free. Read when CUDA is initialised; without CUDA it means nothing.

    Args:
        variables: The environment, which further processes of a run inherit.
    """
    if not set_by_user(variables):
        variables[obeyed_variable()] = EXPANDABLE


def set_by_user(variables: Mapping[str, str]) -> list[str]:
    """The variables of the allocator that are there, whatever they say."""
    return [name for name in ALLOCATOR_VARIABLES if name in variables]


def obeyed_variable() -> str:
    """The variable that the installed release of torch obeys without a warning."""
    try:
        release = tuple(int(part) for part in version("torch").split(".")[:2])
    except (PackageNotFoundError, ValueError):  # what has no such number was built by hand, lately
        release = (2, 11)
    return ALLOCATOR_VARIABLES[0 if release >= (2, 11) else 1]
