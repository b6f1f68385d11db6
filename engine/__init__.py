"""The engine: causal video diffusion, chunk by chunk."""
