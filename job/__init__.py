"""Trains a run on a dataset, evaluates it and predicts masks; imports no Ray."""
