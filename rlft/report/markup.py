"""HTML from values: escaping, numbers, tables, and the document around them with its policy."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import html
import json
import math
from collections.abc import Sequence
from importlib import resources
from typing import Any

MOST_TEXT = 3000
"""Characters of a prompt or completion in the page."""
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src '{style_hash}'; script-src '{script_hash}'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
<script>{script}</script>
</body>
</html>
"""


def text(value: object) -> str:
    """Escaped for HTML, in element or attribute; control characters made visible."""
    return html.escape(visible(str(value)))


def visible(value: str) -> str:
    """The text with a replacement character for each control character but line ends and tabs."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in value)


def number(value: Any, form: str = ".4g") -> str:
    """A number as shown, "-" for null, nan and what was not logged."""
    if value is None or not math.isfinite(value):
        return "-"
    # 1234567 as "1.235e+06" would be hard to read.
    return f"{value:,.0f}" if abs(value) >= 1000 and form.endswith("g") else format(value, form)


def score(value: Any) -> str:
    """A reward, or what a reward function logged."""
    return text(value) if isinstance(value, str) else number(value, ".3g")


def section(title: str, body: str, about: str = "") -> str:
    """A section that the page's navigation finds; nothing for an empty body. about: one sentence under the title."""
    note = f"<p>{about}</p>" if about else ""
    return f'<section id="{anchor(title)}"><h2>{title}</h2>{note}{body}</section>' if body else ""


def anchor(title: str) -> str:
    """ "Held-out completions" -> "held-out-completions"."""
    return title.lower().replace(" ", "-").replace(",", "")


def navigation(titles: Sequence[str], body: str) -> str:
    """Links to those of the sections that are in `body`."""
    there = [title for title in titles if f'id="{anchor(title)}"' in body]
    return "<nav>" + "".join(f'<a href="#{anchor(title)}">{title}</a>' for title in there) + "</nav>"


def tiles(cards: Sequence[tuple[str, str, str]]) -> str:
    """The numbers that matter most: (name, value, note)."""
    made = (
        f'<div class="tile"><span>{text(n)}</span><b>{text(v)}</b><span>{text(s)}</span></div>' for n, v, s in cards
    )
    return f'<div class="tiles">{"".join(made)}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of numbers that scrolls sideways by itself. The first cell of a row names it; all are escaped here."""
    cells = "".join(f"<tr><th>{text(row[0])}</th>{''.join(map(cell, row[1:]))}</tr>" for row in rows)
    top = "".join(f"<th>{text(name)}</th>" for name in head)
    return f'<div class="wide"><table class="numbers"><tr>{top}</tr>{cells}</table></div>'


def cell(value: str) -> str:
    """A cell of a table; a sentence may break into lines."""
    kind = ' class="words"' if len(value) > 60 else ""
    return f"<td{kind}>{text(value)}</td>"


def passage(value: str) -> str:
    """A prompt or completion: messages under their roles, long ones cut, spaces and line ends kept by the style."""
    if value.startswith("["):
        # A text may only start like JSON: it is then shown as it is.
        with contextlib.suppress(ValueError, TypeError, KeyError):
            turns = [(str(m["role"]), str(m["content"])) for m in json.loads(value)]
            shown = "\n".join(f"<i>{text(role)}</i> {cut(content)}" for role, content in turns)
            return f'<div class="passage">{shown or "<i>empty</i>"}</div>'
    return f'<div class="passage">{cut(value) or "<i>empty</i>"}</div>'


def cut(value: str) -> str:
    """The first MOST_TEXT characters, escaped, and how many more there are."""
    more = f" <i>... {len(value) - MOST_TEXT:,} more characters</i>" if len(value) > MOST_TEXT else ""
    return text(value[:MOST_TEXT]) + more


def document(title: str, body: str) -> str:
    """The whole page. body: HTML."""
    style, script = (asset(name) for name in ("report.css", "report.js"))
    return PAGE.format(
        title=text(title), body=body, style=style, script=script, style_hash=digest(style), script_hash=digest(script)
    )


def asset(name: str) -> str:
    """A file that lies beside this one."""
    return resources.files(__package__ or "rlft.report").joinpath(name).read_text(encoding="utf-8")


def digest(source: str) -> str:
    """How a content security policy names an inline style or script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
