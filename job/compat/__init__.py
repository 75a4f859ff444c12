"""Files of the reference implementation's family."""
