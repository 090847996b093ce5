"""Scores of models: metrics, answers to questions, and scoring many subnets with shared work."""
