"""Which pictures make which batch, in which shape, and as which latents."""
