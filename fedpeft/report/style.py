"""The style sheet of our pages: one column, light, readable on paper and on a telephone."""

CSS = """
:root { --ink: #1c2430; --soft: #5b6472; --line: #e1e5eb; --wash: #f6f8fa; --blue: #0b5fa5; --orange: #c2570c;
  --green: #00795a; --grey: #6b7280; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: #fff; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif; }
main { max-width: 900px; margin: 0 auto; padding: 40px 24px 64px; }
main.tables { max-width: 1200px; }
.tables figure { max-width: 900px; }
.kicker { margin: 0; color: var(--soft); font-size: 13px; letter-spacing: .06em; text-transform: uppercase; }
h1 { margin: 2px 0 10px; font-size: 34px; line-height: 1.15; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { margin: 44px 0 8px; font-size: 20px; line-height: 1.3; }
p { margin: 8px 0; max-width: 72ch; }
.lead { font-size: 18px; line-height: 1.5; color: #333c4a; }
.verdict { font-size: 18px; line-height: 1.5; }
.verdict b { color: var(--blue); }
.notice { border-left: 4px solid var(--orange); background: #fdf5ee; padding: 10px 14px; }
.soft, figcaption, .note { color: var(--soft); font-size: 14px; line-height: 1.5; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 15px; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 14px 6px 0; text-align: left; vertical-align: baseline; border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 500; font-size: 13px; line-height: 1.3; vertical-align: bottom; }
tbody th { font-weight: 400; }
table.result tbody th { white-space: nowrap; }
table.dense { font-size: 13.5px; }
.dense th, .dense td { padding: 5px 12px 5px 0; }
.dense thead th { font-size: 12.5px; }
td.n, th.n { text-align: right; white-space: nowrap; }
table.result { width: 100%; margin: 18px 0 10px; }
table.result td, table.result tbody th { padding-top: 8px; padding-bottom: 8px; }
table.result td.bar { width: 30%; padding-right: 0; }
.bar i { display: block; height: 12px; border-radius: 2px; min-width: 1px; }
.federated { font-weight: 650; }
tr.federated th, tr.federated td { font-weight: 650; background: #eef5fb; }
tr.federated th { box-shadow: inset 3px 0 0 var(--blue); padding-left: 10px; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 4px 20px; margin: 22px 0 4px;
  padding: 14px 0; border-top: 1px solid var(--line); border-bottom: 1px solid var(--line); }
.facts div { font-size: 13px; color: var(--soft); }
.facts b { display: block; font-size: 20px; font-weight: 600; color: var(--ink); font-variant-numeric: tabular-nums; }
figure { margin: 14px 0 6px; }
figure svg { display: block; min-width: 600px; height: auto; }
figure svg text { font-family: system-ui, -apple-system, "Segoe UI", "Noto Sans", "DejaVu Sans",
  sans-serif !important; }
figcaption { margin-top: 6px; max-width: 80ch; }
pre { background: var(--wash); border: 1px solid var(--line); border-radius: 6px; padding: 12px 14px; overflow-x: auto;
  font: 13.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .92em;
  overflow-wrap: anywhere; }
.settings { columns: 3 240px; column-gap: 28px; margin-top: 12px; }
.settings section { break-inside: avoid; margin: 0 0 16px; }
.settings h3 { margin: 0 0 2px; font-size: 14px; }
.settings table { width: 100%; font-size: 13.5px; }
.settings th, .settings td { padding: 3px 8px 3px 0; overflow-wrap: anywhere; }
.settings th { color: var(--soft); width: 45%; }
footer { margin-top: 48px; padding-top: 12px; border-top: 1px solid var(--line); color: var(--soft); font-size: 13px; }
@media (max-width: 600px) { main { padding: 24px 16px 40px; } h1 { font-size: 27px; }
  table.result td.bar, table.result th.bar { display: none; } }
@media print { body { font-size: 11pt; } main { max-width: none; padding: 0; } h2 { break-after: avoid; }
  figure, tr, pre { break-inside: avoid; } figure svg { min-width: 0; } .wide { overflow: visible; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } @page { margin: 16mm; } }
"""
