"""The bench: data, training, claims, verdicts, runs. What notebooks use is here; nothing else re-exports."""

from effnb.lab import show
from effnb.lab.judge import stats
from effnb.lab.judge.claims import Sample
from effnb.lab.measure import cost, data, plot, seed, timing, train
from effnb.lab.run.record import Recorder
from effnb.lab.run.resume import resumable
from effnb.lab.show import begin

__all__ = ["Recorder", "Sample", "begin", "cost", "data", "plot", "resumable", "seed", "show", "stats", "timing", "train"]
