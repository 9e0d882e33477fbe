"""Runs of models, data sets and methods: `run_experiments.py`."""
