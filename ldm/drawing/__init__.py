"""What a call of a pipeline is made of: texts, noise, what it draws on, and the way to pixels and back."""
