"""From a template to a page that needs nothing but itself."""

from pathlib import Path
from typing import Any

import jinja2

from sseds_rec.files import write_atomic
from sseds_rec.report.numbers import count, percent


def render_template(template: str, **values: Any) -> str:
    """Fills in a template of this folder. All text is escaped; a name that the template lacks is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(count=count, percent=percent)
    return environment.get_template(template).render(**values)


def write_page(path: Path, page: str) -> Path:
    """Writes a page atomically; a path in it may hold what UTF-8 cannot."""
    content = page.encode("utf-8", errors="replace")
    return write_atomic(path, lambda temporary: temporary.write_bytes(content))
