"""The HTML of a report: escaped text, tables, figures with alternatives, images as data URIs, one style sheet."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from html import escape

import torch
from torch import Tensor

from offramp.core.errors import InvalidInput
from offramp.measure.plots import Picture

_LARGEST_SIDE = 192
"""Pixels; larger images are shrunk, so that the file stays small."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str, *, text_columns: int = 1) -> str:
    """A table that scrolls sideways on a narrow screen; cells are escaped. Columns after ``text_columns`` are set as numbers."""

    def cell(tag: str, value: str, column: int, scope: str = "") -> str:
        return f"<{tag}{scope}{' class=n' if column >= text_columns else ''}>{escape(value)}</{tag}>"

    head = "".join(cell("th", h, i, ' scope="col"') for i, h in enumerate(header))
    body = "".join(
        "<tr>" + cell("th", r[0], 0, ' scope="row"') + "".join(cell("td", v, i) for i, v in enumerate(r[1:], 1)) + "</tr>" for r in rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def figure(picture: Picture, note: str = "", *, small: bool = False) -> str:
    """A picture with its text alternative and its numbers. ``note`` is plain text."""
    caption = f"<strong>{escape(picture.title)}</strong>{' ' + escape(note) if note else ''}"
    return (
        f'<figure class="{"small" if small else "plot"}"><figcaption>{caption}</figcaption>'
        f'<div role="img" aria-label="{escape(picture.alt)}">{picture.svg}</div>'
        f"<details><summary>Numbers</summary>{table(picture.header, picture.rows, picture.title)}</details></figure>"
    )


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text; ``kind`` is ``"fine"`` (small print), ``"note"`` or empty."""
    return f"<p{f' class={kind}' if kind else ''}>{escape(text)}</p>"


def tiles(items: Sequence[tuple[str, str, str]]) -> str:
    """Headline numbers: (name, value, remark) each."""
    cells = (f"<div><dt>{escape(k)}</dt><dd><b>{escape(v)}</b><span>{escape(n)}</span></dd></div>" for k, v, n in items)
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def pixels(images: Sequence[Tensor]) -> list[Tensor]:
    """Images as uint8 ``[H, W, C]`` on the CPU, shrunk if large.

    Floats within [0, 1] are taken as they are; others (normalised inputs) are stretched by the extremes of the shown images.
    """
    if not images:
        return []
    floats = [i.detach().cpu().float() for i in images]
    whole = not images[0].is_floating_point()
    low = 0.0 if whole else min(float(i.min()) for i in floats)
    high = 255.0 if whole else max(float(i.max()) for i in floats)
    if not whole and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    out = []
    for original, image in zip(images, floats, strict=True):
        if image.ndim == 2:
            image = image[None]
        elif image.ndim == 3 and image.shape[-1] in (1, 3, 4) and (whole or image.shape[0] not in (1, 3, 4)):
            image = image.permute(2, 0, 1)
        if image.ndim != 3 or image.shape[0] not in (1, 3, 4):
            raise InvalidInput(
                "examples must be strings or images [N, H, W], [N, H, W, C] or [N, C, H, W] with C of 1, 3 or 4; "
                f"one item is {tuple(original.shape)}."
            )
        image = (image - low) / max(high - low, 1e-12)
        side = max(image.shape[1:])
        if side > _LARGEST_SIDE:
            size = [max(1, round(s * _LARGEST_SIDE / side)) for s in image.shape[1:]]
            image = torch.nn.functional.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]
        out.append((image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous())
    return out


def png_uri(pixels: Tensor) -> str:
    """A PNG data URI of uint8 ``[H, W, C]`` with C of 1, 3 or 4 (PNG specification, sections 5 and 11)."""
    height, width, channels = pixels.shape
    raw = pixels.reshape(height, width * channels).numpy()
    lines = b"".join(b"\0" + row.tobytes() for row in raw)  # filter type 0 before every line

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(data).decode()


def page(title: str, about: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """The whole document; sections are (id, heading, HTML)."""
    links = "".join(f'<a href="#{key}">{escape(heading)}</a>' for key, heading, _ in sections)
    body = "".join(
        f'<section id="{key}" aria-labelledby="{key}-h"><h2 id="{key}-h">{escape(heading)}</h2>{content}</section>'
        for key, heading, content in sections
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        # Nothing may be fetched, whatever text a user's class name holds.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{_CSS}</style></head>'
        f'<body><header><h1>{escape(title)}</h1><p>{escape(about)}</p><nav aria-label="Sections">{links}</nav></header>'
        f"<main>{body}</main><footer><p>Written by offramp. 1 multiply-add = 2 FLOPs.</p></footer></body></html>\n"
    )


_LIGHT = (
    "--paper:#fff;--panel:#f6f7f9;--ink:#1d2126;--muted:#5c6570;--grid:#dfe3e8;"
    "--c1:#1f5fa8;--c2:#c2570c;--c3:#2f7d4f;--c4:#7b4aa6;--c5:#a8324a;--c6:#6d6a5f"
)
_DARK = (
    "--paper:#14171a;--panel:#1d2125;--ink:#e8eaed;--muted:#a3abb5;--grid:#343a41;"
    "--c1:#6fa8e8;--c2:#f0954f;--c3:#6cc08c;--c4:#bd95e6;--c5:#ee7d92;--c6:#b5b09f"
)
_CSS = (
    f":root{{color-scheme:light dark;{_LIGHT}}}@media screen and (prefers-color-scheme:dark){{:root{{{_DARK}}}}}"
    + """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
header,main,footer{max-width:72rem;margin:0 auto;padding:0 1.25rem}
header{padding-top:2rem}
h1{font-size:1.75rem;line-height:1.2;margin:0;overflow-wrap:anywhere}
header p,.fine,footer{color:var(--muted)}
header p{margin:.35rem 0 1rem}
nav{display:flex;flex-wrap:wrap;gap:.25rem 1.1rem;padding:.6rem 0;border-block:1px solid var(--grid);font-size:.875rem}
a{color:var(--c1);text-underline-offset:.2em}
section{padding-top:1.6rem}
h2{font-size:1.3rem;line-height:1.25;margin:0 0 .9rem}
h3{font-size:1.02rem;margin:1.6rem 0 .3rem}
p{margin:.4rem 0 .8rem;max-width:46rem}
.fine,small{font-size:.82rem}
.note{background:var(--panel);border-left:3px solid var(--c2);padding:.6rem .9rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(13rem,1fr));gap:.75rem;margin:0 0 1.2rem}
.tiles>div{background:var(--panel);padding:.75rem .9rem;border-radius:6px}
dt{font-size:.82rem;color:var(--muted)}
dd{margin:0}dd b{display:block;font-size:1.55rem;line-height:1.25;font-weight:600;font-variant-numeric:tabular-nums}
dd span{font-size:.82rem;color:var(--muted)}
.pair{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,27rem),1fr));gap:1.25rem 2rem;align-items:start;
margin:.4rem 0 1rem}
.split{display:grid;gap:1.25rem 2rem;align-items:start;margin:.4rem 0 1rem}
@media(min-width:62rem){.split{grid-template-columns:minmax(0,5fr) minmax(0,6fr)}}
.split>*{min-width:0}.split>figure{max-width:34rem}
.pair>*{max-width:34rem;min-width:0;width:100%}
.smalls{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,15rem),1fr));gap:1rem 1.5rem;margin:.4rem 0 1rem}
figure{margin:0;min-width:0}.small{max-width:19rem}
figcaption{font-size:.875rem;margin-bottom:.35rem;color:var(--muted)}figcaption strong{color:var(--ink)}
svg{display:block;width:100%;height:auto;overflow:visible}
details{font-size:.875rem;margin:.3rem 0 .6rem}summary{cursor:pointer;color:var(--muted)}
.scroll{overflow-x:auto;margin:.3rem 0 .6rem}
table{border-collapse:collapse;font-size:.875rem;min-width:min(100%,22rem)}
caption{text-align:left;font-weight:600;padding:.2rem 0 .4rem}
th,td{text-align:left;padding:.32rem .9rem .32rem 0;border-bottom:1px solid var(--grid);vertical-align:top;
font-variant-numeric:tabular-nums}
th{font-weight:500}tbody th{min-width:6.5rem}thead th{color:var(--muted);font-size:.8rem;vertical-align:bottom}
.n{text-align:right}td.n{white-space:nowrap}
pre{background:var(--panel);padding:.8rem 1rem;border-radius:6px;overflow-x:auto;
font:.76rem/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.images,.texts{list-style:none;padding:0;margin:.5rem 0 1rem;display:grid;gap:1rem}
.images{grid-template-columns:repeat(auto-fill,minmax(7.4rem,1fr))}
.texts{grid-template-columns:repeat(auto-fill,minmax(min(100%,20rem),1fr))}
.images img{display:block;width:6.5rem;height:6.5rem;object-fit:contain;background:var(--panel);border-radius:4px}
.pixel{image-rendering:pixelated}
li p{margin:.3rem 0;overflow-wrap:anywhere}
blockquote{margin:0;padding:.6rem .8rem;background:var(--panel);border-radius:6px;overflow-wrap:anywhere}
.good{color:var(--c3)}.bad{color:var(--c5)}
footer{padding-block:1.5rem 2.5rem;font-size:.82rem}
:focus-visible{outline:2px solid var(--c1);outline-offset:2px}
@media print{nav{display:none}figure,li,tr{break-inside:avoid}}
"""
)
