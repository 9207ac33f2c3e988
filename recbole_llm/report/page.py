"""A web page in one file: no request leaves it, and nothing in it but ours is markup."""

from __future__ import annotations

import html
from collections.abc import Iterable

# The page may use its own style, script and pictures, and load nothing.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
STYLE = """
:root{color-scheme:light;--line:#c9ced6;--soft:#f4f6f8;--ink:#1b1f24;--dim:#57606a;--accent:#0072b2}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1180px;padding:1.5rem;font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:#fff}
h1{font-size:1.6rem;margin:.2rem 0 1rem}h2{font-size:1.15rem;margin:2.2rem 0 .6rem}
a{color:var(--accent)}nav{border-bottom:1px solid var(--line);padding-bottom:.6rem;line-height:1.8}
nav a{margin-right:.9rem}nav span{margin-right:.9rem}nav span a{margin-right:.4rem}nav p{margin:.1rem 0}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
thead{border-top:2px solid var(--ink);border-bottom:1px solid var(--ink)}tbody{border-bottom:2px solid var(--ink)}
td,th{padding:.28rem .6rem;white-space:nowrap}td.text{white-space:normal;max-width:24rem;overflow-wrap:anywhere}
td.text{min-width:6rem}td.text:first-child{min-width:12rem}
tbody tr:nth-child(even){background:var(--soft)}
.number{text-align:right}.text{text-align:left}
th button{font:inherit;font-weight:600;border:0;background:none;cursor:pointer;padding:0}
th[aria-sort=ascending] button::after{content:" \\25B2"}th[aria-sort=descending] button::after{content:" \\25BC"}
.spread{color:var(--dim);font-size:.85em}sup,sub{color:var(--accent);font-weight:600}
.caption,.notes{color:var(--dim);font-size:.88rem;max-width:72rem}
figure{margin:1rem 0}figure img{max-width:100%;height:auto}figcaption{color:var(--dim);font-size:.88rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1rem}dt{color:var(--dim)}
dd{margin:0;overflow-wrap:anywhere}
pre{background:var(--soft);padding:.8rem;overflow-x:auto}
@media print{
 @page{size:landscape;margin:12mm}
 nav{display:none}body{max-width:none;padding:0;font-size:9pt}.scroll{overflow:visible}
 td,th{padding:.1rem .3rem}thead{display:table-header-group}tr,figure{break-inside:avoid}h2{break-after:avoid}
 figure img{max-height:150mm;width:auto}
}
"""
# A click on a header sorts by the first number of each cell, or by its text.
SCRIPT = """
for(const table of document.querySelectorAll("table.sortable")){
 const heads=[...table.tHead.rows[0].cells],body=table.tBodies[0];
 heads.forEach((head,column)=>head.querySelector("button").addEventListener("click",()=>{
  const up=head.getAttribute("aria-sort")==="descending";
  heads.forEach(h=>h.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort",up?"ascending":"descending");
  const key=row=>{const text=row.cells[column].textContent.trim();
   const number=parseFloat(text.replace(/,/g,"").replace(/^[<\\[] ?/,""));
   return [isNaN(number)?null:number,text]};
  const rows=[...body.rows].map(row=>[key(row),row]);
  rows.sort(([a],[b])=>{
   if(a[0]===null&&b[0]===null)return up?a[1].localeCompare(b[1]):b[1].localeCompare(a[1]);
   if(a[0]===null)return 1;if(b[0]===null)return -1;
   return up?a[0]-b[0]:b[0]-a[0]});
  rows.forEach(([,row])=>body.append(row))}))}
"""


def page(title: str, parts: Iterable[str]) -> str:
    """A whole document around parts that are HTML already."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<h1>{html.escape(title)}</h1>\n" + "\n".join(parts) + f"\n<script>{SCRIPT}</script></body></html>\n"
    )
