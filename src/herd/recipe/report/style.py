"""The report's style sheet: light and dark by the reader's setting, printable, nothing from elsewhere."""

CSS = """
:root {
  color-scheme: light dark;
  --bg: #faf9f6; --surface: #ffffff; --ink: #1d1c1a; --muted: #68655d; --line: #e4e1d9; --wash: #f1efe9;
  --s1: #2b5fd3; --s2: #c2561a; --s3: #16805f; --s4: #8247b8; --good: #16805f; --bad: #b3372f;
  --serif: "Iowan Old Style", "Palatino Linotype", Palatino, "Source Serif 4", Georgia, "DejaVu Serif", serif;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif;
  --mono: ui-monospace, "SF Mono", "Cascadia Code", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --bg: #141413; --surface: #1c1c1a; --ink: #eceae4; --muted: #a19e94; --line: #34332f; --wash: #252421;
    --s1: #7fa6ff; --s2: #f2935c; --s3: #55c7a3; --s4: #c79df2; --good: #55c7a3; --bad: #f08a80;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
body { margin: 0; background: var(--bg); color: var(--ink); font: 16px/1.6 var(--sans);
  font-variant-numeric: tabular-nums; text-rendering: optimizeLegibility; }
.page { max-width: 1180px; margin: 0 auto; padding: 56px 28px 96px; display: grid;
  grid-template-columns: 168px minmax(0, 1fr); column-gap: 56px; }
nav { position: sticky; top: 40px; align-self: start; font-size: 13.5px; line-height: 1.35; }
nav a { display: block; padding: 5px 0 5px 14px; color: var(--muted); text-decoration: none;
  border-left: 2px solid var(--line); }
nav a:hover, nav a:focus-visible { color: var(--ink); border-left-color: var(--s1); }
nav .mark { font: 600 19px/1 var(--serif); color: var(--ink); border: 0; padding: 0 0 18px; letter-spacing: -.01em; }
main { max-width: 860px; min-width: 0; }
h1, h2 { font-family: var(--serif); font-weight: 600; letter-spacing: -.015em; line-height: 1.15; text-wrap: balance; }
h1 { font-size: clamp(34px, 5vw, 50px); margin: 0 0 18px; overflow-wrap: anywhere; }
h2 { font-size: 27px; margin: 76px 0 12px; padding-top: 22px; border-top: 1px solid var(--line); }
h3 { font-size: 15px; font-weight: 650; margin: 34px 0 10px; }
p { margin: 0 0 14px; max-width: 68ch; }
.lede { font: 20px/1.5 var(--serif); max-width: 60ch; text-wrap: pretty; }
.muted, .note { color: var(--muted); }
.note { font-size: 14px; line-height: 1.5; }
code, pre, .mono { font-family: var(--mono); font-size: .875em; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.5; tab-size: 4; }
.tiles { display: grid; grid-template-columns: repeat(3, 1fr); gap: 1px; margin: 36px 0 0;
  background: var(--surface); border: 1px solid var(--line); border-radius: 12px; overflow: hidden; }
.tile { padding: 18px 20px 16px; box-shadow: 1px 0 0 var(--line), 0 1px 0 var(--line); }
.tile b { display: block; font: 600 30px/1.15 var(--serif); letter-spacing: -.02em; margin: 4px 0 6px;
  white-space: nowrap; }
.tile b small { font: 500 15px/1 var(--sans); letter-spacing: 0; color: var(--muted); margin-left: 4px; }
.tile span { font-size: 13px; color: var(--muted); display: block; line-height: 1.4; }
.tile .label { color: var(--ink); font-weight: 600; }
.scroll { overflow-x: auto; margin: 14px 0 20px; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px; line-height: 1.45; }
th { text-align: left; font-weight: 600; font-size: 12.5px; color: var(--muted); padding: 0 18px 8px 0;
  vertical-align: bottom; border-bottom: 1px solid var(--line); white-space: nowrap; }
td { padding: 8px 18px 8px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td:first-child { white-space: nowrap; }
td:last-child, th:last-child { padding-right: 0; }
tbody tr:last-child td { border-bottom: 0; }
td.n, th.n { text-align: right; white-space: nowrap; }
table.facts { width: auto; min-width: min(100%, 460px); }
table.facts td:first-child { color: var(--muted); white-space: nowrap; }
figure { margin: 14px 0 22px; }
figcaption { display: flex; flex-wrap: wrap; gap: 4px 20px; font-size: 13px; color: var(--muted); margin: 0 0 6px; }
figcaption span { display: inline-flex; align-items: center; gap: 7px; }
.key { width: 14px; height: 3px; border-radius: 2px; background: var(--c); display: inline-block; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 6px 32px; }
.pair svg text { font-size: 20px; } .pair .line { stroke-width: 3.6; } .pair .line.faint { stroke-width: 1.8; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font: 12px var(--sans); fill: var(--muted); font-variant-numeric: tabular-nums; }
svg text.row { font-size: 13.5px; fill: var(--ink); } svg text.value { font-weight: 600; }
svg .end { text-anchor: end; } svg .mid { text-anchor: middle; }
.grid { stroke: var(--line); stroke-width: 1; shape-rendering: crispEdges; }
.line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.line.faint { stroke-width: 1; opacity: .35; }
.dot { fill: var(--c); stroke: var(--bg); stroke-width: 1.5; }
.whisker { stroke: var(--c); stroke-width: 2.5; stroke-linecap: round; opacity: .55; }
.bar { fill: var(--c); } .bar.s0 { opacity: .5; }
.s1 { --c: var(--s1); } .s2 { --c: var(--s2); } .s3 { --c: var(--s3); }
.s4 { --c: var(--s4); } .s0 { --c: var(--muted); }
.sample { background: var(--surface); border: 1px solid var(--line); border-radius: 10px; padding: 14px 18px;
  margin: 0 0 12px; }
.sample .who { font-size: 12.5px; color: var(--muted); margin: 0 0 6px; }
.sample .prompt { color: var(--muted); }
.sample .turn { display: grid; grid-template-columns: 148px minmax(0, 1fr); gap: 0 14px; align-items: baseline; }
.sample .turn .who { margin: 0; } .sample .turn + .turn { margin-top: 6px; }
.sample .turn .muted { font-size: 13px; }
.right, .wrong { font-weight: 650; } .right { color: var(--good); } .wrong { color: var(--bad); }
details { margin: 10px 0; } summary { cursor: pointer; font-size: 14.5px; padding: 4px 0; }
details pre { background: var(--wash); border-radius: 8px; padding: 12px 16px; margin: 6px 0 12px; }
.formula { background: var(--wash); border-radius: 8px; padding: 12px 16px; margin: 10px 0 16px;
  font: 14px/1.6 var(--mono); overflow-x: auto; }
footer { margin-top: 84px; padding-top: 18px; border-top: 1px solid var(--line); font-size: 13px; color: var(--muted); }
a { color: var(--s1); }
@media (max-width: 900px) {
  .page { display: block; padding: 28px 18px 64px; }
  nav { position: static; display: flex; flex-wrap: wrap; gap: 2px 14px; margin-bottom: 32px; }
  nav a { border: 0; padding: 3px 0; } nav .mark { flex-basis: 100%; padding-bottom: 8px; }
  h2 { margin-top: 52px; }
  .tiles { grid-template-columns: repeat(2, 1fr); } .tile { padding: 14px; } .tile b { font-size: 24px; }
  .sample .turn { grid-template-columns: 1fr; }
}
@media print {
  nav { display: none; } .page { display: block; padding: 0; }
  h2 { break-after: avoid; } figure, .sample { break-inside: avoid; }
}
"""
