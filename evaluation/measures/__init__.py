"""Figures of texts and forecasts, and their intervals."""
