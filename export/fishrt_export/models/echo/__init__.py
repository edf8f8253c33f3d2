"""The diffusion model: keys and values of text, voice and earlier latents, the schedule's modulation, and the denoiser."""
