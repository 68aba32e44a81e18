"""Lets mkdocstrings read the package's docstrings as doctest and Python read them."""

from __future__ import annotations

from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """The extension of griffe that `docs/mkdocs.yml` names."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        """Rename the section "Example:", of which griffe knows the plural alone."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Export functions where griffe sees their module: `lorax_kit.transform.resolve` is the name of both."""
        for name, path in pkg.imports.items():
            if path != f"{pkg.path}.{name}" and path.startswith(pkg.path):
                there = pkg.get_member(path.split(".")[1:])
                if there.is_module and name in there.members:
                    pkg.set_member(name, griffe.Alias(name, f"{there.path}.{name}", parent=pkg))
