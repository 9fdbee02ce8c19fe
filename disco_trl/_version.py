"""The version of the package, and those of others, in a module that imports nothing else of it."""

from __future__ import annotations

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from collections.abc import Iterable


__version__ = "0.1.0"


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """
    Read the versions of installed packages.

    A package that runs from a source tree has no metadata to read its version from, and is left out; so is one that is
    not installed. The version of this package is known without any.

    Args:
        packages (`Iterable[str]`):
            Names of distributions.

    Returns:
        `dict[str, str]`: Versions by name, in the order given.
    """
    from importlib.metadata import PackageNotFoundError, version  # `import disco_trl` costs nothing

    found = {}
    for name in packages:
        try:
            found[name] = __version__ if name == "disco-trl" else version(name)
        except PackageNotFoundError:
            continue
    return found
