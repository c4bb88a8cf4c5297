"""Judging: statistics for few runs, the registry of claims, results as stored; knows no notebook and no clock."""
