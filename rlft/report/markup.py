"""Generate HTML: escaping, numbers, tables, and the document with its content security policy."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from importlib import resources
from typing import Any

from rlft.runs.formats import number, visible
from rlft.runs.tables import read_columns

MOST_TEXT = 3000
"""Largest number of characters shown of a prompt or completion."""
MOST_COLUMN = 300
"""Largest number of characters shown of another column of a dataset row."""
PICTURE = re.compile(r"data:image/jpeg;base64,[A-Za-z0-9+/]+={0,2}")
"""A small picture of an image, as `rlft.runs.tables` writes it."""
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src '{style_hash}'; script-src '{script_hash}'{connect}">
<title>{title}</title>
<style>{style}</style>
</head>
<body{version}>
{body}
<script>{script}</script>
</body>
</html>
"""


def text(value: object) -> str:
    """Escape a value for an HTML element or attribute, with control characters replaced."""
    return html.escape(visible(str(value)))


def score(value: Any) -> str:
    """Format a reward or a value logged by a reward function."""
    return text(value) if isinstance(value, str) else number(value, ".3g")


def section(title: str, body: str, about: str = "") -> str:
    """Return a section for the navigation; empty for an empty body. about: a sentence under the title."""
    note = f"<p>{about}</p>" if about else ""
    return f'<section id="{anchor(title)}"><h2>{title}</h2>{note}{body}</section>' if body else ""


def anchor(title: str) -> str:
    """Return the anchor of a title: "Held-out completions" -> "held-out-completions"."""
    return title.lower().replace(" ", "-").replace(",", "")


def navigation(titles: Sequence[str], body: str) -> str:
    """Return links to the sections that are in `body`."""
    present = [title for title in titles if f'id="{anchor(title)}"' in body]
    return "<nav>" + "".join(f'<a href="#{anchor(title)}">{title}</a>' for title in present) + "</nav>"


def tiles(cards: Sequence[tuple[str, str, str]]) -> str:
    """Return tiles of key numbers: (name, value, note)."""
    items = (
        f'<div class="tile"><span>{text(name)}</span><b>{text(value)}</b><span>{text(note)}</span></div>'
        for name, value, note in cards
    )
    return f'<div class="tiles">{"".join(items)}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Return a horizontally scrollable table. The first cell of a row is its name; all cells are escaped.

    kind: a further class of the table.
    """
    cells = "".join(f"<tr><th>{text(row[0])}</th>{''.join(map(cell, row[1:]))}</tr>" for row in rows)
    top = "".join(f"<th>{text(name)}</th>" for name in head)
    return f'<div class="wide"><table class="{f"numbers {kind}".strip()}"><tr>{top}</tr>{cells}</table></div>'


def cell(value: str) -> str:
    """Return a table cell; long text may wrap."""
    kind = ' class="words"' if len(value) > 60 else ""
    return f"<td{kind}>{text(value)}</td>"


def passage(value: str) -> str:
    """Return a prompt or completion, truncated, whitespace preserved by the style."""
    return f'<div class="passage">{truncate(value) or "<i>empty</i>"}</div>'


def conversation(value: str) -> str:
    """Return a prompt that is JSON of messages, with their roles. A file may hold anything: other text is a passage."""
    try:
        turns = [(str(message["role"]), said(message["content"])) for message in json.loads(value)]
    except (ValueError, TypeError, KeyError, RecursionError):
        return passage(value)
    content_html = "\n".join(f"<i>{text(role)}</i> {truncate(content)}" for role, content in turns)
    return f'<div class="passage">{content_html or "<i>empty</i>"}</div>'


def said(content: Any) -> str:
    """Return the content of a message as text, with [image] where it shows one."""
    if not isinstance(content, list):
        return str(content)
    return "".join("[image]" if part["type"] == "image" else str(part["text"]) for part in content)


def pictures(urls: Sequence[str | None]) -> str:
    """Return small pictures of images. A file may hold anything: what is no JPEG as a data URL is left out."""
    shown = "".join(f'<img src="{url}" alt="image">' for url in urls if url is not None and PICTURE.fullmatch(url))
    return f'<div class="pictures">{shown}</div>' if shown else ""


def columns(value: str | None) -> str:
    """Return the columns of a dataset row from their JSON: names and values, empty for None and for other text."""
    found = read_columns(value)
    if not found:
        return ""
    lines = ""
    for name, entry in found.items():
        written = entry if isinstance(entry, str) else json.dumps(entry, ensure_ascii=False)
        lines += f"<dt>{text(name)}</dt><dd>{text(shorten(written))}</dd>"
    return f'<dl class="columns">{lines}</dl>'


def shorten(value: str) -> str:
    """Return a value of a column on one line, at most MOST_COLUMN characters of it."""
    line = " ".join(value.split())
    return line if len(line) <= MOST_COLUMN else f"{line[:MOST_COLUMN]} ... {len(line) - MOST_COLUMN:,} more characters"


def truncate(value: str) -> str:
    """Return the first MOST_TEXT characters, escaped, and the number of remaining ones."""
    more = f" <i>... {len(value) - MOST_TEXT:,} more characters</i>" if len(value) > MOST_TEXT else ""
    return text(value[:MOST_TEXT]) + more


def document(title: str, body: str, version: str = "") -> str:
    """Return the HTML document. body: HTML. version: of a served page, which then asks its server for a newer one."""
    style, script = (asset(name) for name in ("report.css", "report.js"))
    if version:
        script += asset("live.js").replace('"use strict";\n', "", 1)
    return PAGE.format(
        title=text(title),
        body=body,
        style=style,
        script=script,
        style_hash=digest(style),
        script_hash=digest(script),
        connect="; connect-src 'self'" if version else "",
        version=f' data-version="{text(version)}"' if version else "",
    )


def asset(name: str) -> str:
    """Read a file of this package."""
    return resources.files(__package__ or "rlft.report").joinpath(name).read_text(encoding="utf-8")


def digest(source: str) -> str:
    """Return the hash by which a content security policy allows an inline style or script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
