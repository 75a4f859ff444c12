"""Sends the numbers of a run to other programs: TensorBoard's event files, MLflow."""
