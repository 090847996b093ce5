"""The expression language: operators, expressions, and how they become programs."""
