"""Engines that complete: tails that an engine has drawn, walked on by the same searches as a model of steps."""
