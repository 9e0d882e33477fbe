"""Draws docs/images/worked_tree.svg, the tree of the worked example on the search page:

python docs/images/worked_tree.py

Colours are chosen to be readable on a white and on a dark page.
"""

from __future__ import annotations

import math
from pathlib import Path

SCALE = 2.0  # lambda
GAIN = math.exp(SCALE)  # exp(lambda r) of a completion with r = 1
BOX, EDGE, TEXT = (150, 46), "#7b8794", "#1f2933"
FILLS = {"node": "#dbe4ff", "good": "#c3f0d0", "bad": "#f1f3f5", "open": "none"}


def values() -> dict[str, float]:
    """exp F of each prefix after three rollouts, as the page computes them by hand."""
    warm = 0.5 * GAIN + 0.5
    rest = (warm + 0.9 + 0.1 / 3) / (2 - 0.2 / 3)  # exp G of the prompt: the mean of its two children
    grey = 0.9 + 0.1 * (1 + 2 * rest) / 3
    return {"warm": warm, "grey": grey, "root": 0.4 * warm + 0.6 * grey, "open": (1 + 2 * rest) / 3}


def box(x: int, y: int, kind: str, title: str, note: str) -> str:
    width, height = BOX
    dashed = ' stroke-dasharray="5 4"' if kind == "open" else ""
    colour = EDGE if kind == "open" else TEXT
    return (
        f'<rect x="{x - width // 2}" y="{y}" width="{width}" height="{height}" rx="8" fill="{FILLS[kind]}" '
        f'stroke="{EDGE}"{dashed}/>\n'
        f'<text x="{x}" y="{y + 19}" fill="{colour}" font-weight="600">{title}</text>\n'
        f'<text x="{x}" y="{y + 36}" fill="{colour}">{note}</text>'
    )


def edge(start: tuple[int, int], end: tuple[int, int], p: float, target: float, dashed: bool = False) -> str:
    """A line as wide as the target gives it weight, with p and the estimated target beside it."""
    (x1, y1), (x2, y2) = start, end
    style = ' stroke-dasharray="5 4"' if dashed else ""
    x, y = (2 * x1 + 3 * x2) // 5, (2 * y1 + 3 * y2) // 5 + 2  # below the middle, where siblings are apart
    return (
        f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{EDGE}" stroke-width="{1 + 7 * target:.1f}"{style}/>\n'
        f'<rect x="{x - 47}" y="{y - 15}" width="94" height="21" rx="10" fill="#ffffff" stroke="{EDGE}"/>\n'
        f'<text x="{x}" y="{y}" fill="{TEXT}">{p:.1f} → {target:.2f}</text>'
    )


def drawing() -> str:
    v = values()
    top, middle, low = 10, 120, 230
    spots = {"root": (380, top), "warm": (190, middle), "grey": (570, middle)}
    leaves = [(100, "warm", "good", "sun", "r = 1", 0.5, 0.5 * GAIN / v["warm"])]
    leaves.append((280, "warm", "bad", "rain", "r = 0", 0.5, 0.5 / v["warm"]))
    leaves.append((480, "grey", "bad", "rain", "r = 0", 0.9, 0.9 / v["grey"]))
    leaves.append((660, "grey", "open", "not tried yet", "estimated", 0.1, 0.1 * v["open"] / v["grey"]))
    parts = []
    for name, p in (("warm", 0.4), ("grey", 0.6)):
        x, y = spots[name]
        parts.append(edge((380, top + BOX[1]), (x, y), p, p * v[name] / v["root"]))
    for x, parent, kind, _, _, p, target in leaves:
        above, y = spots[parent]
        parts.append(edge((above, y + BOX[1]), (x, low), p, target, kind == "open"))
    for name, title in (("root", "“Tomorrow:”"), ("warm", "warm"), ("grey", "grey")):
        parts.append(box(*spots[name], "node", title, f"V = {math.log(v[name]) / SCALE:.2f}"))
    parts += [box(x, low, kind, title, note) for x, _, kind, title, note, _, _ in leaves]
    head = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 290" role="img" text-anchor="middle" '
        'font-family="system-ui, sans-serif" font-size="14">\n'
        "<title>A tree after three rollouts: each edge shows the model's probability and the estimated target</title>\n"
    )
    return head + "\n".join(parts) + "\n</svg>\n"


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(drawing(), encoding="utf-8")
