"""Training: recipes in, checkpoints and pipeline folders out. `fit` in train/fit/loop.py is the only loop."""
