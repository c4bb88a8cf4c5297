"""Small pictures of verdicts as SVG text: a claim's interval against its criterion, the scoreboard, the badge."""

import html
import math
from collections.abc import Mapping, Sequence

#: Verdict to (background, ink, sign) for files that carry their own colours; readable on white and on black.
TILES = {
    "reproduced": ("#d3efe4", "#07543e", "✓"),
    "checked-analytically": ("#d6e8f6", "#0a4a78", "✓"),
    "partially": ("#fbe6b4", "#664300", "◐"),
    "not-reproduced-at-this-scale": ("#f9d3ca", "#8a2412", "✗"),
    "not-tested": ("#e6eaee", "#46515c", "–"),
    "smoke": ("#e6eaee", "#46515c", "~"),
    "not-run": ("#ffffff", "#6b7682", "…"),
}
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


def _position(values: Sequence[float], width: float, pad: float, log: bool):
    warp = math.log10 if log else float
    low, high = min(map(warp, values)), max(map(warp, values))
    room = (high - low) or max(abs(high), 1.0)
    return lambda v: pad + (width - 2 * pad) * (warp(v) - low + 0.12 * room) / ((high - low) + 0.24 * room)


def _allowed(criterion, place, width: float) -> tuple[float, float]:
    """Left and right end of the region where the criterion holds."""
    if criterion.op == "within":
        return place(criterion.threshold - criterion.margin), place(criterion.threshold + criterion.margin)
    return (place(criterion.threshold), width) if criterion.op in (">", ">=") else (0.0, place(criterion.threshold))


def strip(row: Mapping, width: float = 190.0, height: float = 26.0) -> str:
    """The estimate and its interval on a line, the region that the criterion allows shaded; empty if unmeasured.

    The axis is logarithmic where all values are positive and span more than a factor of 20.

    Args:
        row: a flat row of the scoreboard with ``measured`` and ``criterion``.
        width: of the picture, in pixels.
        height: the same.
    """
    found, criterion = row.get("measured") or {}, row["criterion"]
    if found.get("estimate") is None:
        return ""
    ends = [criterion.threshold - (criterion.margin or 0), criterion.threshold + (criterion.margin or 0)]
    values = [found["estimate"], *(found["ci"] or []), *ends]
    place = _position(values, width, 6, min(values) > 0 and max(values) > 20 * min(values))
    left, right = _allowed(criterion, place, width)
    edges = [e for e in (left, right) if 0 < e < width]
    ci = [place(v) for v in found["ci"] or [found["estimate"]] * 2]
    middle, what = height / 2, f"estimate {found['estimate']:.3g}"
    what += f", interval {found['ci'][0]:.3g} to {found['ci'][1]:.3g}" if found["ci"] else ""
    lines = "".join(
        f'<path d="M{e:.1f} 2V{height - 2:.0f}" stroke="var(--eff-good)" stroke-width="1.2" stroke-dasharray="3 2"/>'
        for e in edges
    )
    return (
        f'<svg class="eff-strip" viewBox="0 0 {width:.0f} {height:.0f}" preserveAspectRatio="xMinYMid" role="img" '
        f'aria-label="{html.escape(what)}; shaded: where the criterion holds">'
        f'<rect x="{left:.1f}" y="3" width="{max(right - left, 0.0):.1f}" height="{height - 6:.0f}" '
        f'fill="var(--eff-good-bg)"/>'
        f'{lines}<path d="M{ci[0]:.1f} {middle}H{ci[1]:.1f}" stroke="currentColor" stroke-width="2.4" '
        f'stroke-linecap="round"/><circle cx="{place(found["estimate"]):.1f}" cy="{middle}" r="4" '
        f'fill="currentColor"/></svg>'
    )


def _tile(x: float, y: float, row: Mapping) -> str:
    back, ink, sign = TILES[row["verdict"]]
    edge = ' stroke="#8a2412" stroke-width="1.6"' if row["contradicted"] else f' stroke="{ink}" stroke-opacity=".25"'
    label = f"{sign} {row['id'].split('/')[1]}" + "★" * bool(row["primary"])
    return (
        f'<rect x="{x:.0f}" y="{y:.0f}" width="58" height="26" rx="6" fill="{back}"{edge}/>'
        f'<text x="{x + 29:.0f}" y="{y + 17.5:.1f}" text-anchor="middle" font-size="12.5" '
        f'font-weight="600" fill="{ink}">{label}</text>'
    )


def _legend(counts: Mapping[str, int], words: Mapping[str, tuple[str, str]], y: float) -> str:
    parts, x = [], 20.0
    for verdict, count in counts.items():
        back, ink, sign = TILES[verdict]
        label = f"{count} {words[verdict][1]}"
        parts.append(
            f'<rect x="{x:.0f}" y="{y - 12:.0f}" width="18" height="16" rx="4" fill="{back}" '
            f'stroke="{ink}" stroke-opacity=".4"/>'
            f'<text x="{x + 9:.0f}" y="{y + 1:.0f}" text-anchor="middle" font-size="11" fill="{ink}">{sign}</text>'
            f'<text x="{x + 24:.0f}" y="{y + 1:.0f}" font-size="12.5" fill="#46515c">{html.escape(label)}</text>'
        )
        x += 24 + 7.1 * len(label) + 16
    return "".join(parts)


def scoreboard_svg(rows: Sequence[Mapping], counts: Mapping, words: Mapping[str, tuple[str, str]]) -> str:
    """The scoreboard at one glance: a line a chapter, a tile a claim, a legend with counts.

    Args:
        rows: flat rows, sorted.
        counts: what :func:`effnb.lab.publish.scoreboard.tally` returns.
        words: verdict to sign and words.
    """
    chapters: dict[str, list[Mapping]] = {}
    for row in rows:
        chapters.setdefault(row["chapter"], []).append(row)
    widest = max((len(c) for c in chapters.values()), default=1)
    left = 64 + round(7.8 * max((len(c[0]["title"]) for c in chapters.values()), default=10))
    width, height = max(760, left + 64 * widest + 14), 100 + 38 * len(chapters)
    note = "★ primary claim of its chapter" + " · dark edge: contradicted" * bool(counts["contradicted"])
    title = f"{counts['confirmed']} of {counts['total']} claims confirmed"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'role="img" aria-label="Scoreboard: {title}" font-family="{_FONT}">',
        f'<rect x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="12" fill="#ffffff" stroke="#d5dce3"/>',
        f'<text x="20" y="36" font-size="20" font-weight="700" fill="#16202a">{title}</text>',
        f'<text x="{width - 20}" y="36" text-anchor="end" font-size="12.5" fill="#46515c">{note}</text>',
        _legend(counts["verdicts"], words, 64),
    ]
    for i, (chapter, found) in enumerate(chapters.items()):
        y = 86 + 38 * i
        name = html.escape(f"{chapter[:2]}  {found[0]['title']}")
        lines.append(f'<text x="20" y="{y + 18}" font-size="14" fill="#16202a">{name}</text>')
        lines += [_tile(left + 64 * k, y, row) for k, row in enumerate(found)]
    return "\n".join([*lines, "</svg>"]) + "\n"


def badge_svg(confirmed: int, total: int) -> str:
    """The README's badge, ``claims | x/y confirmed``.

    >>> "19/22 confirmed" in badge_svg(19, 22)
    True
    """
    value = f"{confirmed}/{total} confirmed"
    left, right = 50, 14 + round(6.4 * len(value))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + right}" height="20" role="img" '
        f'aria-label="claims: {value}">'
        f'<rect width="{left + right}" height="20" rx="4" fill="#0a6b4f"/>'
        f'<path d="M4 0H{left}V20H4A4 4 0 0 1 0 16V4A4 4 0 0 1 4 0Z" fill="#46515c"/>'
        f'<g fill="#ffffff" text-anchor="middle" font-family="Verdana, DejaVu Sans, sans-serif" font-size="11">'
        f'<text x="{left / 2:.0f}" y="14">claims</text>'
        f'<text x="{left + right / 2:.1f}" y="14">{value}</text></g></svg>\n'
    )
