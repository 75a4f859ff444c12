"""Renders a page from a template: text is escaped, and a missing value is an error.

The templates decide how pages look. A page is one file: no script, no request, embedded images.
"""

import functools
import re
from typing import TYPE_CHECKING, Any, TypeVar

from flexunet.text import pluralize
from job.reporting.views.parts import number

if TYPE_CHECKING:
    from jinja2 import Environment

T = TypeVar("T", bound=str)


def render_page(template: str, url: str, *, title: str | None = None, **values: Any) -> str:
    """Returns the HTML of a page.

    Args:
        template: its file in `templates/`.
        url: shown below the title.
        title: None: the last part of `url`.
        values: of the template.
    """
    name = title or url.rstrip("/").rsplit("/", 1)[-1]
    return _environment().get_template(template).render(name=name, url=url, **values) + "\n"


@functools.cache
def _environment() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("job.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.filters["one_line"] = _one_line
    environment.filters["anchor"] = _anchor
    environment.filters["px"] = _pixels
    environment.globals["pluralize"] = pluralize
    return environment


def _one_line(text: T) -> T:
    """Returns prose or markup with single spaces and no line breaks of the template."""
    parts = text.replace("\n", " ").split(" ")
    return type(text)(" ".join(part for part in parts if part))


def _anchor(title: str) -> str:
    """Returns the id of a section."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _pixels(value: float) -> str:
    """Returns a coordinate with at most one decimal."""
    return f"{value:.1f}".removesuffix(".0")
