"""The bench: data, training, statistics, claims, cost, timing, plots, runner, sweep and command line."""
