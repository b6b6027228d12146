"""Training: recipes in, checkpoints and pipeline folders out. `fit` in loop.py is the only loop."""
