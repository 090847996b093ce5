"""Latency: tables measured block by block, and whole models timed side by side."""
