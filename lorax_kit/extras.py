"""The extras of an installation, what each is for, one line for where one is missing, and imports on demand."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

EXTRAS = {
    "cli": "the command line, with the models and the report",
    "models": "the packaged models, and Hugging Face folders",
    "report": "pages and plots of studies",
    "study": "the report, and results as pandas tables",
    "llama": "models in GGUF files",
    "export": "ONNX files, in fp32 and int8",
    "litert": "LiteRT files",
    "table": "results as pandas tables",
    "data": "rows in Parquet files",
    "text": "BLEU and chrF of written texts",
    "track": "logs for TensorBoard and Weights & Biases",
    "search": "studies that Optuna searches",
    "cluster": "studies on a Ray cluster",
    "all": "all of these but litert",
    "docs": "the site of the guide",
    "interop": "measurements beside torch, transformers and PEFT",
    "dev": "tests, lint and types",
}


def need(extra: str, *modules: str, raises: type[Exception] = ImportError) -> None:
    """Check that what an extra installs is there.

    Raises:
      ImportError, or `raises`: a module is missing; the message says which extra brings it.
    """
    for name in modules:
        if find_spec(name) is None:
            raise raises(f"{name} is not installed.\n  install the extra: pip install 'lorax_kit[{extra}]'")


def installed(name: str) -> str | None:
    """The version of an installed package; None where it is not."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def importing(package: str, places: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package (PEP 562): a name imports its own module, and no other.

    A package of many commands or pages then costs what is asked of it, not all that it could do.

    Args:
      package: `__name__` of the package.
      places: name -> the module within the package that defines it, as in "pages.run".
    """

    def get(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{places[name]}"), name)

    return get, lambda: sorted({*vars(sys.modules[package]), *places})
