"""Where image/mask pairs come from."""
