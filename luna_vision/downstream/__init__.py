"""Uses of the backbone: detection, segmentation, embeddings, and probes of frozen features."""
