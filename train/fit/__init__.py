"""The one training loop, and that nothing it has done is lost."""
