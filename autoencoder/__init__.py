"""The autoencoder, pixels to latents and back, and the layers that it shares with the UNet."""
