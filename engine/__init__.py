"""ffnas engine: teacher, student and supernet models, distillation, data, training and evaluation."""
