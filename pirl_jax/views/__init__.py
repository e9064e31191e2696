"""Augmentation on the device: photometric operations, the jigsaw's patches, and both views of a batch."""
