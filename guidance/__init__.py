"""How several predictions of one step become one: pure torch, no import of ComfyUI."""
