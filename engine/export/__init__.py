"""Models on disk for others: Hugging Face directories and ONNX."""
