"""For the site: KaTeX comes from an installed package and is loaded only by pages with formulas.

`make docs` installs `djangocms-katex` (KaTeX, its styles and fonts as plain files) without its dependencies into
`katex/` of the virtual environment. No browser asks another host for anything.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.utils import get_relative_url

PACKAGE = Path(sys.prefix, "katex/djangocms_katex/static/djangocms_katex/vendor/katex")
FILES = ("katex.min.css", "katex.min.js", "LICENSE")
RENDER = """
for (const formula of document.querySelectorAll(".arithmatex"))
  katex.render(formula.textContent.trim().slice(2, -2), formula, {displayMode: formula.tagName == "DIV"});
"""


def on_config(config: Any) -> None:
    if not PACKAGE.is_dir():
        raise PluginError(f"KaTeX is not in {PACKAGE}; `make docs` installs it")


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Load KaTeX where a formula is."""
    if 'class="arithmatex"' not in output:
        return output
    at = get_relative_url("katex/", page.url)
    head = f'<link rel="stylesheet" href="{at}katex.min.css"><script src="{at}katex.min.js"></script>'
    return output.replace("</head>", f"{head}</head>").replace("</body>", f"<script>{RENDER}</script></body>")


def on_post_build(config: Any) -> None:
    target = Path(config["site_dir"], "katex")
    (target / "fonts").mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copy(PACKAGE / name, target)
    for font in (PACKAGE / "fonts").glob("*.woff2"):
        shutil.copy(font, target / "fonts")
