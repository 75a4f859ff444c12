"""Plans a new run from its dataset and machine; does not import TensorFlow."""
