"""The input of training: samples, their order, batches, augmentation."""
