"""From a prompt to the embeddings a denoiser listens to: CLIP's tokenizer and CLIP's text transformer."""
