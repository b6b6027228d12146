"""Adapters: small files that change a model, such as LoRA and learned words, in place of its weights."""
