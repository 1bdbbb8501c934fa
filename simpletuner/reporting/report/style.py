"""The look of the report: light and dark as the reader's system has it, and on paper."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --ink: #17202b; --muted: #64707d; --paper: #fcfcfd; --card: #fff; --line: #e3e7ec;
  --soft: #f1f4f7; --c1: #2563eb; --c2: #e2572b; --c3: #0f9f6e; --c4: #8b5cf6; --good: #0f8a5f; --warn: #b45309;
  --bad: #c02626; --shadow: 0 1px 2px rgb(16 24 40 / .05), 0 1px 3px rgb(16 24 40 / .06); }
@media (prefers-color-scheme: dark) { :root { --ink: #e7ebf0; --muted: #93a0ae; --paper: #0f1318; --card: #171c23;
  --line: #29313b; --soft: #1f262f; --c1: #6ea0ff; --c2: #ff8a5c; --c3: #3ecf9a; --c4: #b79bff; --good: #3ecf9a;
  --warn: #f5b041; --bad: #ff7b72; --shadow: none; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 16px; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.55 Inter, ui-sans-serif, system-ui,
  -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; -webkit-font-smoothing: antialiased; }
main { max-width: 1200px; margin: 0 auto; padding: 40px 28px 80px; }
h1 { font-size: 32px; line-height: 1.2; letter-spacing: -.02em; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 20px; letter-spacing: -.01em; margin: 56px 0 16px; }
h3 { font-size: 15px; margin: 24px 0 8px; overflow-wrap: anywhere; }
p { margin: 4px 0; } a { color: var(--c1); text-decoration: none; } a:hover { text-decoration: underline; }
.muted { color: var(--muted); } .nowrap { white-space: nowrap; }
.title { display: flex; flex-wrap: wrap; gap: 8px 14px; align-items: center; margin-bottom: 6px; }
.pill { font-size: 12px; font-weight: 600; padding: 3px 10px; border-radius: 99px; background: var(--soft);
  color: var(--muted); border: 1px solid var(--line); }
.pill.finished { color: var(--good); border-color: currentColor; } .pill.failed { color: var(--bad);
  border-color: currentColor; } .pill.interrupted, .pill.unfinished { color: var(--warn); border-color: currentColor; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 22px 0 0; padding: 10px 0; font-size: 14px;
  border-block: 1px solid var(--line); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; box-shadow: var(--shadow); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-top: 24px; }
.figures .card { padding: 14px 16px; } .figures b { display: block; font-size: 23px; line-height: 1.25;
  letter-spacing: -.02em; font-variant-numeric: tabular-nums; } .figures small { color: var(--muted); display: block; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 16px; }
.chart { margin: 0; padding: 14px 16px 10px; } .chart.wide { grid-column: 1 / -1; overflow-x: auto; }
.chart.wide svg { min-width: 720px; }
.chart figcaption { font-weight: 600; display: flex; flex-wrap: wrap; justify-content: space-between; gap: 2px 18px; }
.chart > p { font-size: 13px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; font-weight: 400; font-size: 13px; color: var(--muted); }
.legend i { display: inline-block; width: 18px; height: 0; border-top: 3px solid; vertical-align: middle;
  margin-right: 6px; border-radius: 2px; } .legend i.dashed { border-top-style: dashed; }
svg { display: block; width: 100%; height: auto; margin-top: 6px; }
svg text { fill: var(--muted); font-size: 12px; font-variant-numeric: tabular-nums; }
.grid { stroke: var(--line); } .axis { stroke: var(--muted); }
polyline { fill: none; stroke-width: 2; stroke-linejoin: round; stroke: currentColor; }
.c1 { color: var(--c1); } .c2 { color: var(--c2); } .c3 { color: var(--c3); } .c4 { color: var(--c4); }
polyline.faint { stroke-width: 1; opacity: .32; } polyline.dashed { stroke-dasharray: 6 5; }
.dot { fill: currentColor; stroke: var(--card); stroke-width: 1.5; } .touch { fill: currentColor; opacity: 0; }
.touch:hover { opacity: 1; }
.scroll { overflow-x: auto; border-radius: 12px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; font-weight: 600; color: var(--muted); font-size: 12.5px; } th, td { padding: 6px 10px 6px 0;
  vertical-align: top; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
tr:last-child > td { border-bottom: 0; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.box { padding: 10px 16px; } .options td:last-child { white-space: nowrap; }
code, pre, .code { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--soft); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px; margin: 8px 0;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.warn { border-left: 3px solid var(--warn); padding: 6px 12px; margin: 8px 0; background: var(--soft);
  border-radius: 0 8px 8px 0; overflow-wrap: anywhere; white-space: pre-wrap; } .warn.bad { border-color: var(--bad); }
.shots { padding: 12px; } .shots table { width: auto; min-width: 100%; border-collapse: separate; border-spacing: 8px; }
.shots th, .shots td { border: 0; padding: 0; } .shots thead th { text-align: center; }
.shots .prompt { width: 200px; min-width: 150px; font-size: 13px; line-height: 1.4; padding-right: 8px;
  font-weight: 400; color: var(--ink); vertical-align: middle; }
.shots .prompt b { display: block; } .shots td { width: 168px; min-width: 84px; }
.shots .prompt span { display: -webkit-box; -webkit-line-clamp: 5; -webkit-box-orient: vertical; overflow: hidden; }
.pic, .missing { display: grid; place-items: center; aspect-ratio: 1; background: var(--soft); border-radius: 8px;
  overflow: hidden; color: var(--muted); font-size: 12px; }
.pic > summary { list-style: none; cursor: zoom-in; width: 100%; height: 100%; display: grid; place-items: center; }
.pic > summary::-webkit-details-marker { display: none; }
.pic img { max-width: 100%; max-height: 100%; width: 100%; height: 100%; object-fit: contain; display: block; }
img.small { image-rendering: pixelated; }
.pic[open] > summary { position: fixed; inset: 0; z-index: 9; background: rgb(8 10 14 / .88); cursor: zoom-out;
  padding: 4vmin; } .pic[open] img { max-width: min(92vw, 1024px); max-height: 92vh; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)); gap: 14px; margin-top: 16px; }
.tiles figure { margin: 0; } .tiles figcaption { font-size: 12.5px; line-height: 1.35; margin-top: 5px;
  overflow-wrap: anywhere; display: -webkit-box; -webkit-line-clamp: 4; -webkit-box-orient: vertical;
  overflow: hidden; }
.tiles .pic { aspect-ratio: auto; } .tiles .pic img { height: auto; }
.tiles small { color: var(--muted); display: block; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); gap: 16px; }
.columns.wide { grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); align-items: start; }
.columns > * { padding: 14px 16px; } .columns h3 { margin: 0 0 8px; }
.stage { display: grid; grid-template-columns: 110px 1fr 72px; gap: 10px; align-items: center; font-size: 14px; }
.stage b { text-align: right; font-weight: 600; font-variant-numeric: tabular-nums; }
.times .stage { grid-template-columns: minmax(120px, 240px) 1fr 110px; }
.track { background: var(--soft); border-radius: 4px; height: 9px; overflow: hidden; }
.track i { display: block; height: 100%; background: var(--c1); border-radius: 4px; }
details.more { margin-top: 12px; } details.more > summary { cursor: pointer; color: var(--c1); font-size: 14px; }
footer { margin-top: 64px; padding-top: 14px; border-top: 1px solid var(--line); color: var(--muted); font-size: 13px; }
@media (max-width: 640px) { main { padding: 24px 16px 48px; } h1 { font-size: 25px; }
  .shots .prompt { width: 96px; min-width: 96px; font-size: 12px; } .columns .nowrap { white-space: normal; }
  .options tr:first-child { display: none; } .options td { display: block; border: 0; padding: 0; }
  .options td:first-child { color: var(--muted); padding-top: 8px; }
  .options td:last-child { white-space: normal; font-size: 12.5px; padding-bottom: 8px;
    border-bottom: 1px solid var(--line); } }
@media print { :root { --paper: #fff; --card: #fff; --ink: #000; --muted: #555; --line: #ccc; --soft: #f4f4f4;
  --c1: #1d4ed8; --c2: #c2410c; --c3: #047857; --c4: #6d28d9; --shadow: none; }
  @page { margin: 14mm 12mm; } * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  main { max-width: none; padding: 0; } nav { display: none; } h2, h3 { break-after: avoid; }
  .card, tr, figure { break-inside: avoid; } .card.options, .card.shots { break-inside: auto; }
  .scroll, .chart.wide { overflow: visible; } .chart.wide svg { min-width: 0; } body { font-size: 10pt; }
  h2 { margin-top: 32px; } .shots table { width: 100%; table-layout: fixed; border-spacing: 4px; }
  .shots thead th:first-child { width: 120px; }
  .shots .prompt { width: auto; min-width: 0; font-size: 8pt; } .shots td { width: auto; min-width: 0; }
  .shots thead th { font-size: 7pt; } pre { break-inside: avoid; } .charts { grid-template-columns: 1fr 1fr; } }
"""
