"""A page to look through a data set: every picture with its captions, its size in training and what was found."""

from __future__ import annotations

import base64
import html
import io
from collections import defaultdict
from pathlib import Path

from PIL import Image

from glmimg.atomic_write import write_text
from glmimg.dataset.buckets import Fit
from glmimg.dataset.checking import Report

__all__ = ["embedded_picture", "write_page"]

MOST = 2000  # pictures on a page
STYLE = """body{font:14px/1.4 system-ui,sans-serif;margin:2em;color:#222;background:#fff}
.sheet{display:grid;grid-template-columns:repeat(auto-fill,minmax(180px,1fr));gap:16px}
figure{margin:0}img{max-width:100%;border:1px solid #ddd}figcaption{font-size:12px;overflow-wrap:anywhere}
.e{color:#b00020}.w{color:#8a5a00}.s{color:#666}
table{border-collapse:collapse}td,th{padding:2px 12px 2px 0;text-align:left}"""


def embedded_picture(picture: Image.Image, side: int = 256) -> str:
    """An <img> that carries a small version of the picture in itself."""
    small = picture.convert("RGB")
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, format="WEBP", quality=80)
    return f'<img src="data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}" alt="">'


def _fading(thumbnail: Image.Image, fit: Fit) -> Image.Image:
    """The picture, pale where it is cut off."""
    (height, width), scale = fit.bucket, thumbnail.width / fit.scaled[0]
    box = [round(scale * edge) for edge in (fit.left, fit.top, fit.left + width, fit.top + height)]
    faded = Image.blend(thumbnail, Image.new("RGB", thumbnail.size, "white"), 0.7)
    faded.paste(thumbnail.crop((box[0], box[1], box[2], box[3])), (box[0], box[1]))
    return faded


def write_page(report: Report, path: str | Path) -> None:
    """Writes one HTML file that needs nothing else."""
    told = report.to_dict()
    by_label: dict[str, list[str]] = defaultdict(list)
    rows = []
    for finding in report.findings:
        line = f'<span class="{"e" if finding.error else "w"}">{html.escape(finding.message)}</span>'
        by_label[finding.label].append(line)
        rows.append(f"<tr><td>{html.escape(finding.kind)}</td><td>{line}</td><td>{html.escape(finding.fix)}</td></tr>")
    figures = []
    for checked, thumbnail in list(zip(report.usable, report.thumbnails, strict=True))[:MOST]:
        height, width = checked.fit.bucket
        size = f"{checked.size[0]}x{checked.size[1]} &rarr; {width}x{height}, {checked.fit.lost:.0%} cut off"
        captions = "<br>".join(html.escape(caption) for caption in checked.example.captions)
        notes = "<br>".join(by_label.get(checked.example.label, []))
        label = html.escape(checked.example.label)
        parts = [f"<b>{label}</b>", captions, f'<span class="s">{size}</span>', notes]
        shown = embedded_picture(_fading(thumbnail, checked.fit))
        figures.append(f"<figure>{shown}<figcaption>{'<br>'.join(filter(None, parts))}</figcaption></figure>")
    summary = "".join(
        f"<tr><td>{html.escape(key.replace('_', ' '))}</td><td>{html.escape(str(value))}</td></tr>"
        for key, value in told.items()
        if key not in ("findings", "buckets")
    )
    buckets = "".join(f"<tr><td>{size}</td><td>{count}</td></tr>" for size, count in told["buckets"].items())
    left = len(report.usable) - MOST
    more = f"<p>The first {MOST}; {left} more are not shown.</p>" if left > 0 else ""
    page = (
        f"<!doctype html><meta charset=utf-8><title>{html.escape(told['place'])}</title><style>{STYLE}</style>"
        f"<h1>{html.escape(told['place'])}</h1><table>{summary}</table><h2>Sizes</h2><table>{buckets}</table>"
        f"<h2>Findings</h2><table>{''.join(rows) or '<tr><td>none</td></tr>'}</table>"
        f'<h2>Pictures</h2><p>What is pale is cut off.</p>{more}<div class="sheet">{"".join(figures)}</div>'
    )
    write_text(path, page)
