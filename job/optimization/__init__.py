"""Adam, its learning rate, and the loss scale of float16."""
