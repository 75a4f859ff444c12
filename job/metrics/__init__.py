"""Computes segmentation metrics of batches and of cases."""
