"""One HTML page that holds everything it shows.

Pictures are data URIs, every text is escaped, and the page uses neither scripts nor the network.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from pipeline.files import write_atomically

MIME = {".png": "image/png", ".gif": "image/gif"}

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Content security policy, by which the browser enforces what the page promises."""

STYLE = """
body {
  font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem;
  color: #1a1a1a; background: #fff;
}
section { border-top: 1px solid #ccc; margin-top: 2rem; }
h2 { overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; }
figure { margin: 1rem 0; }
figcaption { color: #555; font-size: 0.9rem; }
table { border-collapse: collapse; }
th, td { border-bottom: 1px solid #ddd; padding: 0.2rem 1rem 0.2rem 0; text-align: left; }
.skipped { color: #8a1c00; }
"""


@dataclass(frozen=True)
class Section:
    """One explained image or video."""

    title: str
    classes: Sequence[tuple[str, float]] = ()
    """Pairs (name, probability), the most probable first."""
    pictures: Sequence[tuple[str, Path]] = ()
    """Pairs (caption, PNG or GIF file)."""


def write_page(
    path: Path,
    title: str,
    notes: Sequence[str],
    sections: Sequence[Section],
    skipped: Sequence[str],
) -> None:
    """Write the page: the notes, what could not be read, and a section for each image."""
    left_out = "".join(f"<li>{escape(line)}</li>" for line in skipped)
    parts = [
        *(f"<p>{escape(note)}</p>" for note in notes),
        f'<div class="skipped"><p>Left out:</p><ul>{left_out}</ul></div>' if skipped else "",
        *map(_section, sections),
    ]
    write_atomically(path, page_html(title, parts).encode())


def page_html(title: str, parts: Sequence[str]) -> str:
    """Whole page that holds ``parts``, which are HTML, under the plain text ``title``."""
    policy = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    head = [
        "<!DOCTYPE html>",
        f'<html lang="en"><head><meta charset="utf-8">{policy}',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
    ]
    return "\n".join([*head, *parts, "</body></html>\n"])


def _section(section: Section) -> str:
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{probability:.3f}</td></tr>"
        for name, probability in section.classes
    )
    table = f"<table><tr><th>class</th><th>probability</th></tr>{rows}</table>" if rows else ""
    figures = "".join(figure_html(caption, path) for caption, path in section.pictures)
    return f"<section><h2>{escape(section.title)}</h2>{table}{figures}</section>"


def figure_html(caption: str, path: Path) -> str:
    """Part of a page that shows the PNG or GIF file at ``path``."""
    data = base64.b64encode(path.read_bytes()).decode()
    text = escape(caption)
    image = f'<img alt="{text}" src="data:{MIME[path.suffix]};base64,{data}">'
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>"
