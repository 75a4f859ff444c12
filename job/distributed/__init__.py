"""Sets up devices and processes, and exchanges gradients and messages between them."""
