"""What attention does inside a forward pass: pure torch, no import of ComfyUI."""
