"""The diffusion model: text and voice → latent frames, from noise by Euler steps."""
