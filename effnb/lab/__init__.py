"""The bench: data, training, claims, verdicts, runs. What notebooks use is here; nothing else re-exports."""

import importlib

# Loaded when they are first asked for: a process that runs one function of the bench must not wait for all of it, and
# a chapter's staleness key must not name what it does not use.
_HOMES = {
    "Recorder": "run.record:Recorder",
    "Sample": "judge.claims:Sample",
    "begin": "show:begin",
    "cost": "measure.cost",
    "data": "measure.data",
    "plot": "measure.plot",
    "resumable": "run.stale:resumable",
    "seed": "measure.seed",
    "show": "show",
    "stats": "judge.stats",
    "timing": "measure.timing",
    "train": "measure.train",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home, _, thing = _HOMES[name].partition(":")
    module = importlib.import_module(f"{__name__}.{home}")
    return getattr(module, thing) if thing else module


def __dir__() -> list[str]:
    return __all__
