"""Options that describe the setting of a method: --variant, --rank, --alpha and --set."""

from __future__ import annotations

import json
from dataclasses import fields
from functools import reduce
from typing import Any

import click

from lorax_kit.cli.root import given

OPTIONS = (
    click.option("--rank", type=int, default=8, show_default=True, help="Rows of the factors."),
    click.option("--alpha", type=float, default=16.0, show_default=True, help="Numerator of the scale, alpha / rank."),
    click.option("--variant", default="lora", show_default=True, help="The method: lora, dora, vera, ..."),
    click.option(
        "--set",
        "more",
        metavar="KEY=VALUE",
        multiple=True,
        help="A further setting of the method, may be repeated: start=pissa (none that needs data), factor=8.",
    ),
)
FLAGS = {"rank": "--rank", "alpha": "--alpha", "variant": "--variant", "more": "--set"}


def setting_options(command: Any) -> Any:
    """Add the options to a command; `setting_of` reads what they give."""
    return reduce(lambda f, option: option(f), reversed(OPTIONS), command)


def setting_of(variant: str, rank: int, alpha: float, more: tuple[str, ...]) -> Any:
    """The setting. A method without a rank or an alpha does without the default, and refuses a given one."""
    from lorax_kit.core.specs.spec import setting_class, setting_from

    cls = setting_class(variant)
    known = {f.name for f in fields(cls)} if cls is not None else set()
    settings: dict[str, Any] = {"rank": rank, "alpha": alpha}
    settings = {k: v for k, v in settings.items() if k in known or given(k)}
    for pair in more:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise click.UsageError(f"--set {pair!r} is not KEY=VALUE.")
        if key in FLAGS:
            raise click.UsageError(f"--set {pair!r}: {key} has an option of its own, {FLAGS[key]}.")
        try:
            settings[key] = json.loads(value)
        except ValueError:
            settings[key] = value
    return setting_from({"kind": variant, **settings}, "the setting")
