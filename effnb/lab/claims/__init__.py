"""Claims: registered before they are measured, judged by code, reported with intervals."""

from effnb.lab.claims.recorder import Recorder
from effnb.lab.claims.registry import Claim, ClaimSet, load, load_all, systems
from effnb.lab.claims.report import at_a_glance, format_measured, glance_html, report
from effnb.lab.claims.results import check, compare, diff, joined, load_result
from effnb.lab.claims.verdict import VERDICTS, Criterion, Measured, combine, evaluate, is_worse

__all__ = [
    "VERDICTS",
    "Claim",
    "ClaimSet",
    "Criterion",
    "Measured",
    "Recorder",
    "at_a_glance",
    "check",
    "combine",
    "compare",
    "diff",
    "evaluate",
    "format_measured",
    "glance_html",
    "is_worse",
    "joined",
    "load",
    "load_all",
    "load_result",
    "report",
    "systems",
]
