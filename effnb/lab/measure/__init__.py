"""Measuring: data, training, seeds, time, cost, plots; knows nothing of claims."""
