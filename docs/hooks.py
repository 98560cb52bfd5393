"""A hook of mkdocs: docstrings write names as [`Name`], as transformers does; show them as code."""

import re
from typing import Any


def on_page_content(html: str, **_: Any) -> str:
    """Remove the brackets around names."""
    return re.sub(r"\[(<code>[^<]*</code>)\]", r"\1", html)
