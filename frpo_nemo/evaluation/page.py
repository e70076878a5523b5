"""HTML of a report: a document that refers to nothing outside itself, tables, figures, notes. No content of its own."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from html import escape

from frpo_nemo.evaluation.figures import Picture
from frpo_nemo.evaluation.tables import Table

STYLE = """
body { max-width: 1120px; margin: 2.5rem auto; padding: 0 1.5rem; background: #fff; color: #1d1d1f;
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .6rem; }
h2 { font-size: 1.35rem; margin: 3rem 0 .8rem; padding-top: 1rem; border-top: 1px solid #ddd; }
h3 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
p, li { max-width: 46rem; }
figure { margin: 1.2rem 0 2rem; }
figure img { width: 100%; height: auto; }
figcaption, .note { color: #555; font-size: .88rem; max-width: 50rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; margin: .6rem 0 .5rem; }
th, td { padding: .25rem .9rem .25rem 0; text-align: right; white-space: nowrap; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 1px solid #888; font-weight: 600; white-space: normal; min-width: 3.2rem; }
tbody tr.section th { padding-top: .9rem; font-weight: 600; color: #444; text-align: left; }
tbody td { border-bottom: 1px solid #eee; }
table.settings td { white-space: normal; overflow-wrap: anywhere; }
details { margin: 1rem 0; }
summary { cursor: pointer; font-weight: 600; }
code { font-size: .88em; }
"""


def document(title: str, parts: Iterable[str]) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str, *, note: bool = False) -> str:
    return f'<p class="note">{escape(text)}</p>' if note else f"<p>{escape(text)}</p>"


def bullets(sentences: Iterable[str]) -> str:
    return "<ul>\n" + "\n".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "\n</ul>"


def folded(title: str, parts: Iterable[str]) -> str:
    return f"<details><summary>{escape(title)}</summary>\n" + "\n".join(parts) + "\n</details>"


def preformatted(text: str) -> str:
    return f"<pre><code>{escape(text)}</code></pre>"


def figure(picture: Picture) -> str:
    image = base64.b64encode(picture.path.read_bytes()).decode()
    caption = escape(picture.caption)
    return f'<figure><img src="data:image/png;base64,{image}" alt="{caption}">\n<figcaption>{caption}</figcaption></figure>'


def table(content: Table, *, kind: str = "") -> str:
    """kind: a CSS class."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in content.headings)
    body = []
    for title, rows in content.sections.items():
        if title:
            body.append(
                f'<tr class="section"><th scope="rowgroup" colspan="{len(content.headings)}">{escape(title)}</th></tr>'
            )
        body += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    note = paragraph(content.note, note=True) if content.note else ""
    return (
        f'<div class="scroll"><table class="{kind}">\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(body)
        + f"\n</tbody></table></div>\n{note}"
    )
