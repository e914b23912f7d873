"""The templates of a package's pages, and the style sheet that all pages share."""

from __future__ import annotations

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, select_autoescape


def templates(package: str) -> Environment:
    """The templates in a package's folder; ``{% include "style.css" %}`` brings the shared style sheet."""
    return Environment(
        loader=ChoiceLoader([PackageLoader(package, "."), PackageLoader("equinorm.page", ".")]),
        autoescape=select_autoescape(default=True, default_for_string=True, disabled_extensions=("css",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
