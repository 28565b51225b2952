"""What stands on the backbone: embeddings, and tests of frozen features. Each module is imported by its own name."""
