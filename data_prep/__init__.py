"""Images and masks become a committed dataset; knows storage and records, never TensorFlow."""
