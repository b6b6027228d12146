"""What `fit` trains: autoencoder, text encoder, diffusion model."""
