"""Which trajectory is walked: solvers as functions of a denoiser, pure torch, no import of ComfyUI."""
