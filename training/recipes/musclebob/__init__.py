"""A small GRPO run from end to end: a model learns to call SpongeBob SquarePants "Musclebob Buffpants".

`python -m dts.training.recipes.musclebob train` and `test`; docs/training.md tells the whole story.
"""
