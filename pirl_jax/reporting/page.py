"""One HTML page without anything from outside: its style sheet, its tables, and images as data URIs.

The functions return HTML. Texts are escaped by `escaped`; an argument named `body` is HTML already.
"""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from pirl_jax.reporting.charts import number

STYLE = """
:root { color-scheme: light dark; --back:#fff; --card:#f6f8fa; --ink:#1b1f24; --soft:#57606a; --rule:#d0d7de;
  --good:#1a7f37; --bad:#b3261e; --warn:#9a5b00; --band:#1a7f3724; --link:#0b57d0;
  --c0:#1f5fbf; --c1:#b45309; --c2:#177245; --c3:#7c3aed; --c4:#0e7490; --c5:#be185d; --c6:#7c5a1e; --c7:#57606a; }
@media (prefers-color-scheme: dark) { :root { --back:#0d1117; --card:#161b22; --ink:#e6edf3; --soft:#9da7b1;
  --rule:#30363d; --good:#56d364; --bad:#ff8078; --warn:#f0b35b; --band:#3fb95030; --link:#79b8ff;
  --c0:#79b8ff; --c1:#f0a95b; --c2:#5fd08a; --c3:#b99bff; --c4:#56c7dd; --c5:#ff8fc0; --c6:#d6b36a; --c7:#a8b1bb; }
  .plot { filter:invert(.93) hue-rotate(180deg) } }
* { box-sizing:border-box }
body { margin:0; background:var(--back); color:var(--ink); font:16px/1.5 system-ui,sans-serif; overflow-wrap:anywhere }
main, header, nav div { max-width:1120px; margin:0 auto; padding:0 16px }
header { padding-top:24px } main { padding-bottom:64px } section { scroll-margin-top:56px }
h1 { font-size:1.7rem; margin:0 0 4px; line-height:1.25 }
h2 { font-size:1.3rem; margin:40px 0 12px; padding-top:12px; border-top:1px solid var(--rule) }
section:first-child h2 { margin-top:8px; border-top:0 }
h3 { font-size:1.05rem; margin:24px 0 8px } h3 .soft { font-weight:400; font-size:.85rem }
p { margin:8px 0; max-width:75ch } .soft { color:var(--soft) } a { color:var(--link) }
nav { position:sticky; top:0; z-index:1; background:var(--back); border-bottom:1px solid var(--rule); margin-top:16px }
nav div { display:flex; gap:16px; overflow-x:auto; padding-top:8px; padding-bottom:8px; white-space:nowrap }
nav a { text-decoration:none }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(130px,1fr)); gap:12px; margin:16px 0 }
.tile { background:var(--card); border:1px solid var(--rule); border-radius:8px; padding:10px 14px }
.tile b { display:block; font-size:1.25rem; font-variant-numeric:tabular-nums }
.tile span { color:var(--soft); font-size:.85rem }
.verdict { border-left:5px solid var(--c); background:var(--card); border-radius:0 8px 8px 0; margin:16px 0;
  padding:12px 16px }
.verdict b { color:var(--c); font-size:1.2rem; display:block }
.good { --c:var(--good) } .bad { --c:var(--bad) } .open { --c:var(--warn) }
.charts { display:grid; grid-template-columns:repeat(auto-fill,minmax(min(100%,328px),1fr)); gap:8px 28px }
figure { margin:0; min-width:0 } figcaption { font-size:.85rem; color:var(--soft) } figcaption b { color:var(--ink) }
svg { display:block; width:100%; height:auto } svg text { fill:var(--soft); font-size:11px; font-family:inherit }
.grid { stroke:var(--rule); stroke-width:1; fill:none } .dot { fill:var(--c) } .healthy { fill:var(--band) }
.line { stroke:var(--c); stroke-width:1.8; fill:none; stroke-linejoin:round }
.level { stroke:var(--soft); stroke-dasharray:4 4; fill:none } .map { max-width:640px }
.key { margin-right:12px } .key::before { content:""; display:inline-block; width:14px; height:3px;
  background:var(--c); margin-right:5px; vertical-align:middle }
.in { color:var(--good) } .out { color:var(--warn); font-weight:600 }
.scroll { overflow-x:auto; max-width:100% } table { border-collapse:collapse; font-size:.9rem; margin:8px 0 }
th, td { text-align:left; padding:4px 16px 4px 0; border-bottom:1px solid var(--rule); vertical-align:top;
  overflow-wrap:break-word; max-width:70ch }
th { color:var(--soft); font-weight:600 } .n { text-align:right }
td.n { font-variant-numeric:tabular-nums; white-space:nowrap }
.bars { display:grid; grid-template-columns:max-content max-content 1fr; gap:6px 12px; max-width:640px;
  align-items:center } .bars i { height:12px; background:var(--c0); border-radius:2px }
.row { display:grid; grid-template-columns:repeat(7,1fr); gap:12px; margin:18px 0; align-items:start }
.row img { width:100%; aspect-ratio:1; object-fit:contain; background:var(--card); border-radius:4px; display:block }
.row figcaption { font-size:.75rem; line-height:1.3; margin-top:6px; max-height:5.2em; overflow:hidden }
.query img { outline:3px solid var(--soft) } .same img { outline:3px solid var(--good) }
.other img { outline:3px solid var(--bad) } .small img { image-rendering:pixelated }
.wide { max-width:100%; height:auto; display:block; border-radius:4px }
.map-image { width:100%; max-width:900px; height:auto; display:block; background:var(--card); border-radius:8px }
.swatch { display:inline-block; width:10px; height:10px; border-radius:5px; margin:0 5px 0 12px; background:var(--c) }
.problem { border:1px solid var(--warn); border-radius:8px; padding:8px 12px; color:var(--warn) }
details { margin:8px 0 } summary { cursor:pointer; color:var(--link) }
.map circle { stroke:var(--ink); stroke-opacity:.3 }
@media (max-width:700px) { .row { grid-template-columns:repeat(4,1fr) } h1 { font-size:1.35rem }
  .stack thead { display:none } .stack table, .stack tbody, .stack tr, .stack td { display:block; text-align:left }
  .stack td { border:0; padding:0 } .stack td:first-child { font-weight:600 } .stack td:empty { display:none }
  .stack tr { border-bottom:1px solid var(--rule); padding:6px 0 } .stack td:last-child { color:var(--soft) } }
@media print { nav { display:none } }
"""


def escaped(value: object) -> str:
  """Returns the value as text, escaped for HTML, also within attributes."""
  return html.escape(str(value), quote=True)


def document(title: str, subtitle: str, sections: Sequence[tuple[str, str, str]]) -> str:
  """Returns the whole page.

  Args:
    title, subtitle: the heading, as plain text.
    sections: (id, heading as plain text, body) of each section.
  """
  links = "".join(f'<a href="#{name}">{escaped(heading)}</a>' for name, heading, _ in sections)
  bodies = "\n".join(f'<section id="{name}"><h2>{escaped(heading)}</h2>\n{body}\n</section>'
                     for name, heading, body in sections)
  return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escaped(title)}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<header><h1>{escaped(title)}</h1><p class="soft">{escaped(subtitle)}</p></header>
<nav aria-label="Sections"><div>{links}</div></nav>
<main>
{bodies}
</main>
</body>
</html>
"""


def table(header: Sequence[str], rows: Sequence[Sequence[object]], *, stack: bool = False) -> str:
  """Returns a table; numbers stand on the right. A wide table scrolls by itself, so the page need not.

  Args:
    header: the names of the columns.
    rows: as many values each; None leaves a cell empty.
    stack: True shows the cells of a row below each other on a phone, for columns with sentences.
  """
  def cell(value: object, tag: str, numeric: bool) -> str:
    return f'<{tag}{" class=n" if numeric else ""}>{_shown(value)}</{tag}>'

  numeric = [bool(rows) and all(isinstance(row[place], int | float | None) and not isinstance(row[place], bool)
                                for row in rows) for place in range(len(header))]
  head = "".join(cell(name, "th", right) for name, right in zip(header, numeric, strict=True))
  lines = "".join(f"<tr>{''.join(cell(value, 'td', right) for value, right in zip(row, numeric, strict=True))}</tr>"
                  for row in rows)
  return (f'<div class="scroll{" stack" if stack else ""}" tabindex="0"><table><thead><tr>{head}</tr></thead>'
          f"<tbody>{lines}</tbody></table></div>")


def _shown(value: object) -> str:
  if isinstance(value, bool) or not isinstance(value, int | float):
    return "" if value is None else escaped(value)
  return f"{value:,}" if isinstance(value, int) else number(value)


def tree(figures: Mapping[str, Any], meanings: Mapping[str, str]) -> str:
  """Returns nested JSON values as HTML: single values in one table, a group of groups as a table with a row each.

  Args:
    figures: the values; of a long list the first few are shown.
    meanings: what a value means, by its name; {} leaves the column out.
  """
  single = {name: value for name, value in figures.items() if not isinstance(value, dict)}
  parts = []
  if single:
    rows = [[name, _brief(value), *([meanings.get(name, "")] if meanings else [])] for name, value in single.items()]
    header = ["figure", "value", *(["meaning"] if meanings else [])]
    parts.append(table(header, rows, stack=bool(meanings)))
  for name, group in figures.items():
    if not isinstance(group, dict) or not group:
      continue
    note = f' <span class="soft">{escaped(meanings[name])}</span>' if name in meanings else ""
    parts.append(f"<h3>{escaped(name)}{note}</h3>")
    if all(isinstance(inner, dict) for inner in group.values()):
      columns = list(dict.fromkeys(key for inner in group.values() for key in inner))
      parts.append(table(["", *columns], [[key, *(_brief(inner.get(column)) for column in columns)]
                                          for key, inner in group.items()]))
    else:
      parts.append(table(["", "value"], [[key, _brief(inner)] for key, inner in group.items()]))
  return "".join(parts)


def _brief(value: Any) -> Any:
  if isinstance(value, dict):
    return ", ".join(f"{key}: {_brief(inner)}" for key, inner in list(value.items())[:4]) + (
      ", ..." if len(value) > 4 else "")
  if isinstance(value, list):
    return ", ".join(str(_brief(inner)) for inner in value[:6]) + (f", ... ({len(value)})" if len(value) > 6 else "")
  return float(f"{value:.4g}") if isinstance(value, float) else value


def tiles(figures: Sequence[tuple[str, str]]) -> str:
  """Returns a row of tiles with (label, value)."""
  shown = "".join(f'<div class="tile"><b>{escaped(value)}</b><span>{escaped(label)}</span></div>'
                  for label, value in figures)
  return f'<div class="tiles">{shown}</div>'


def data_uri(image: Image.Image, *, longest: int, quality: int = 80) -> str:
  """Returns an image as a data URI, shrunk so that its longer side has at most `longest` pixels.

  A small image stays as it is, without loss.
  """
  if max(image.size) > longest:
    image = image.copy()
    image.thumbnail((longest, longest))
  file = io.BytesIO()
  if max(image.size) <= 64:
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
  image.save(file, "WEBP", quality=quality)
  return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def picture(uri: str, alt: str, css: str) -> str:
  """Returns an image element of a data URI."""
  return f'<img class="{css}" src="{uri}" alt="{escaped(alt)}">'
