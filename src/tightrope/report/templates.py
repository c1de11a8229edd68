"""Pages from templates: one file each, without scripts or network. Jinja escapes every value."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

HERE = Path(__file__).parent


def fill(template: str, **values: object) -> str:
    """The page that `template` makes of `values`, with the style sheet inside."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    css = Markup((HERE / "page.css").read_text())
    return environment.get_template(template).render(css=css, **values)
