"""From images on disk to batches on the devices: sources, crops, batches, and the embedded textures."""
