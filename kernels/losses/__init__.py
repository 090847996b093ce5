"""Fused losses of knowledge distillation."""
