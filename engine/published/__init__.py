"""EfficientBERT as published: presets and conversion of its checkpoints."""
