"""What a checkpoint of the diffusion model has on disk: its files, recognised by the names of their tensors."""
