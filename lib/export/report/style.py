"""The page's style sheet: system fonts, two colour schemes, readable from 360 pixels on."""

STYLE = """
:root { --ink: #1d2329; --soft: #5a6570; --paper: #fbfaf7; --card: #ffffff; --rule: #dcd8cf;
  --mark: #9a5b13; --good: #1a7f4b; --bad: #b3261e;
  --c0: #1f5fa8; --c1: #b4501a; --c2: #2b7d47; --c3: #8a3d97; --c4: #a3241f; --c5: #4c6a70;
  --c6: #7a6a00; --c7: #c0357c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6e8; --soft: #9aa4ad; --paper: #14171a;
  --card: #1c2024; --rule: #343a40; --mark: #e0a35c; --good: #5ec48d; --bad: #f08379;
  --c0: #7db4f0; --c1: #f0a06e; --c2: #79cf94; --c3: #d59be0; --c4: #f28d86; --c5: #a3c0c6;
  --c6: #d9c64a; --c7: #f58abb; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", "Noto Sans CJK JP",
  "Hiragino Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 20px 16px 60px; }
header p { color: var(--soft); margin: 0 0 8px; }
h1 { font-size: 26px; margin: 0 0 4px; letter-spacing: .01em; }
h2 { font-size: 19px; margin: 38px 0 8px; border-top: 2px solid var(--ink); padding-top: 8px; }
h3 { font-size: 15px; margin: 20px 0 6px; }
nav { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 14px; }
a { color: var(--c0); }
p.note { color: var(--soft); font-size: 13.5px; margin: 4px 0 10px; max-width: 72ch; }
.scroll { overflow-x: auto; border: 1px solid var(--rule); border-radius: 6px;
  background: var(--card); }
table { border-collapse: collapse; width: 100%; font-size: 14px;
  font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--rule); vertical-align: top; }
th { font-weight: 600; color: var(--soft); font-size: 12.5px; }
th:first-child, td:first-child, .l { text-align: left; }
td:first-child { position: sticky; left: 0; background: var(--card); }
tr:last-child td { border-bottom: 0; }
tr.best td:nth-child(2) { font-weight: 700; color: var(--good); }
tr.beside td { color: var(--soft); font-style: italic; }
.tag { font-size: 11.5px; color: var(--mark); border: 1px solid var(--mark); border-radius: 3px;
  padding: 0 4px; margin-left: 6px; font-style: normal; }
.missing { color: var(--mark); }
.ok { color: var(--good); } .wrong { color: var(--bad); font-weight: 700; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr));
  gap: 12px; }
figure { margin: 0; background: var(--card); border: 1px solid var(--rule); border-radius: 6px;
  padding: 10px; min-width: 0; }
figcaption { font-size: 13.5px; font-weight: 600; margin-bottom: 4px; }
.chart { width: 100%; height: auto; display: block; }
.chart text { fill: var(--soft); font: 11.5px system-ui, sans-serif; }
.chart .name { font-weight: 600; }
.grid { stroke: var(--rule); stroke-width: 1; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.dashed { stroke-dasharray: 5 4; }
details { background: var(--card); border: 1px solid var(--rule); border-radius: 6px;
  padding: 8px 12px; margin: 8px 0; }
summary { cursor: pointer; font-weight: 600; }
dl { margin: 8px 0 0; } dt { color: var(--soft); font-size: 13px; margin-top: 8px; }
dd { margin: 2px 0 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.5 ui-monospace, "DejaVu Sans Mono", "Noto Sans Mono CJK JP", monospace; }
dd b { font-weight: 700; color: var(--c0); }
code { font: 12.5px ui-monospace, "DejaVu Sans Mono", monospace; }
:target { background: color-mix(in srgb, var(--c6) 18%, transparent); }
footer { margin-top: 40px; color: var(--soft); font-size: 13px; }
@media (max-width: 480px) { main { padding: 14px 8px 40px; } figure { padding: 6px 3px; }
  th, td { padding: 5px 7px; } }
@media print { .scroll { overflow: visible; } }
"""
STYLE += "".join(
    f".c{n} {{ stroke: var(--c{n}); }} .dot.c{n} {{ fill: var(--c{n}); }} "
    f".chart text.t{n} {{ fill: var(--c{n}); }}\n"
    for n in range(8)
)
