"""Fills the pages of `templates`, and puts figures into them (the only file that uses jinja2)."""

from __future__ import annotations

import re
from importlib import resources
from typing import Any

from lorax_kit.extras import need

need("report", "jinja2")

import jinja2

from lorax_kit.report.plots import Plot


def render(template: str, **context: Any) -> str:
    """Fill a page of `templates`; a name that the context lacks is an error."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(_source),
    )
    return environment.get_template(template).render(**context)


def _source(name: str) -> str:
    return resources.files("lorax_kit.report").joinpath("templates", name).read_text(encoding="utf-8")


def inline_svg(plot: Plot) -> str:
    """The figure as an `<svg>` element for a page that holds several.

    Without the XML prologue, scaled by its box, with ids made unique to the figure and its caption as label.
    """
    body = plot.svg[plot.svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{plot.name}-', body)
    body = re.sub(r'href="#', f'href="#{plot.name}-', body)
    body = body.replace("url(#", f"url(#{plot.name}-")
    head, rest = body.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-labelledby="{plot.name}-caption">{rest}'
