"""Running: what a chapter hands in, chapters one by one or many, sweeps, staleness, benchmarks."""
