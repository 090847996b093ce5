"""What a model looks like, as data: layers, sizes, the architecture file, and what it costs by formula."""
