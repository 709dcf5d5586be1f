"""What the ranking panel shows, as HTML. Documents and queries are untrusted text: every piece of them is escaped."""

import re
from collections.abc import Collection, Mapping
from html import escape

import numpy as np
import pandas as pd

from ..evaluate import BASELINE
from ..reporting.style import look
from ..search import Ranking
from .controls import ink

CSS = """<style>
.rm-lists { display: grid; gap: 14px; margin: 6px 0 14px; overflow-x: auto; }
.rm-lists h4 { margin: 0 0 2px; padding-top: 4px; font-size: 13px; border-top: 3px solid; }
.rm-lists .rm-note { font-size: 11.5px; min-height: 1.4em; }
.rm-lists ol { list-style: none; margin: 4px 0 0; padding: 0; }
.rm-lists li { padding: 4px 6px; border-bottom: 1px solid var(--jp-border-color2, #ddd); font-size: 12px; min-height: 62px; }
.rm-lists li.rm-relevant { box-shadow: inset 3px 0 0 #009E73; }
.rm-lists li.rm-read { background: var(--jp-layout-color2, #eee); }
.rm-lists .rm-head { display: flex; flex-wrap: wrap; gap: 0 7px; font-variant-numeric: tabular-nums; }
.rm-lists .rm-head b { min-width: 1.4em; }
.rm-lists .rm-up { color: color-mix(in srgb, #0072B2, white var(--rm-lighter, 0%)); }
.rm-lists .rm-down { color: color-mix(in srgb, #B34700, white var(--rm-lighter, 0%)); }
.rm-lists .rm-tick { color: color-mix(in srgb, #00694d, white var(--rm-lighter, 0%)); font-weight: 700; white-space: nowrap; }
.rm-lists .rm-score { margin-left: auto; opacity: .75; }
.rm-lists .rm-text { display: -webkit-box; -webkit-line-clamp: 2; -webkit-box-orient: vertical; overflow: hidden; line-height: 1.3; }
.rankmamba mark { background: none; color: inherit; font-weight: 700; text-decoration: underline 2px #E69F00; }
.rm-document { max-width: 860px; font-size: 13.5px; line-height: 1.75; margin: 6px 0 8px; }
.rm-document .rm-sentence { padding: 2px 0; border-radius: 2px; }
.rm-document sup { font-size: 10px; font-variant-numeric: tabular-nums; padding: 0 3px; font-weight: 600; }
.rm-document .rm-sentence, .rm-document sup, .rm-lists .rm-text { unicode-bidi: isolate; }
.rm-document .rm-unread { opacity: .45; }
</style>"""
SHOWN = 10  # documents of each list
SPEAKS_FOR, SPEAKS_AGAINST = "0, 114, 178", "213, 94, 0"  # blue and orange, which the colour-blind can tell apart


def marked(text: str, words: Collection[str]) -> str:
    """A text as HTML with the words of the query marked."""
    pieces = re.split(r"(\w+)", text)
    return "".join(f"<mark>{escape(piece)}</mark>" if piece.lower() in words else escape(piece) for piece in pieces)


def lists_html(
    lists: Mapping[str, Ranking],
    texts: Mapping[str, str],
    judged: Mapping[str, int],
    words: Collection[str],
    read: str | None = None,
) -> str:
    """The lists of several systems side by side, BM25's first: score, judgement, movement, and the beginning of each text.

    judged: {doc_id: relevance}, empty where nothing was judged for the query. read: the document that is open below.
    """
    before = {doc_id: place for place, doc_id in enumerate(lists[BASELINE].doc_ids, 1)}
    names = {doc_id: f"rm-d{place}" for doc_id, place in before.items()}
    columns = [_column(system, ranking, texts, judged, words, read, before, names) for system, ranking in lists.items()]
    together = "".join(
        f".rm-lists:has(.{name}:hover) .{name}{{background:var(--jp-layout-color2,#eee)}}" for name in names.values()
    )
    width = f"repeat({len(columns)}, minmax(104px, 1fr))"  # if narrower the lists scroll instead of overlapping
    return f'{CSS}<style>{together}</style><div class="rm-lists" style="grid-template-columns:{width}">{"".join(columns)}</div>'


def _column(system, ranking, texts, judged, words, read, before, names) -> str:
    places = [place for place, doc_id in enumerate(ranking.doc_ids, 1) if judged.get(doc_id, 0) > 0]
    count = len(ranking.doc_ids)
    said = f"{count} document{'s' * (count != 1)}, {1000 * ranking.seconds:,.0f} ms" + " from states" * ranking.from_states
    if judged:
        said += f"<br>first relevant: {places[0]}" if places else "<br>no relevant document"
    digits = _digits(np.ptp(ranking.scores[:SHOWN]) if ranking.scores else 1)
    rows = []
    for place, (doc_id, score) in enumerate(zip(ranking.doc_ids[:SHOWN], ranking.scores, strict=False), 1):
        relevant = judged.get(doc_id, 0) > 0
        classes = [names[doc_id], *(["rm-relevant"] if relevant else []), *(["rm-read"] if doc_id == read else [])]
        head = [f"<b>{place}</b>"]
        if system != BASELINE:
            head.append(_movement(before[doc_id] - place))
        if relevant:
            head.append('<span class="rm-tick">✓ relevant</span>')
        head.append(f'<span class="rm-score">{score:.{digits}f}</span>')
        text = f'<div class="rm-text" dir="auto">{marked(texts[doc_id][:240], words)}</div>'
        rows.append(f'<li class="{" ".join(classes)}"><div class="rm-head">{"".join(head)}</div>{text}</li>')
    heading = f'<h4 style="border-color:{ink(look(system).color)}">{escape(system)}</h4><div class="rm-note">{said}</div>'
    return f"<section>{heading}<ol>{''.join(rows)}</ol></section>"


def _movement(up: int) -> str:
    if up == 0:
        return '<span title="where BM25 had it">=</span>'
    name, arrow = ("rm-up", "▲") if up > 0 else ("rm-down", "▼")
    return f'<span class="{name}" title="places against BM25">{arrow}{abs(up)}</span>'


def document_html(parts: pd.DataFrame, words: Collection[str], system: str) -> str:
    """A document sentence by sentence, shaded by how each moves the score. parts: the table of `Search.occlusion`."""
    largest = max(parts["difference"].abs().max(), 1e-9)
    pieces = [_sentence(row, largest, words) for row in parts.itertuples()]
    note = (
        f"The number at a sentence: {escape(system)}'s score minus its score without that sentence. "
        f'<span style="background:rgba({SPEAKS_FOR},.3)">blue</span> speaks for the document, '
        f'<span style="background:rgba({SPEAKS_AGAINST},.35)">orange</span> against it'
        + ("." if parts["read"].all() else "; pale text is beyond the cut and not read.")
    )
    return f'{CSS}<div class="rm-document" dir="auto">{"".join(pieces)}</div><div class="rm-note" style="max-width:860px">{note}</div>'


def _sentence(row, largest: float, words: Collection[str]) -> str:
    color = SPEAKS_FOR if row.difference > 0 else SPEAKS_AGAINST
    strength = 0.4 * abs(row.difference) / largest
    shade = f"background:rgba({color},{strength:.3f})"
    unread = "" if row.read else " rm-unread"
    body = marked(row.sentence.strip(), words)
    return f'<span class="rm-sentence{unread}" style="{shade}">{body}<sup dir="ltr">{row.difference:+.{_digits(largest)}f}</sup></span> '


def _digits(size: float) -> int:
    """How many decimals numbers of this size need to be distinguishable: at least two, at most five."""
    return int(np.clip(1 - np.floor(np.log10(max(size, 1e-9))), 2, 5))
