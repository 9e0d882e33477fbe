"""Recipes: small complete training runs on the trainers of `dts.training`."""
