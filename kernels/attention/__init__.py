"""Fused attention and its linear layers."""
