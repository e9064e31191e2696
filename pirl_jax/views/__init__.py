"""Augmentation on the device: photometric operations, pretext transforms, and both views of a batch."""
