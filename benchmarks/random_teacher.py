"""A teacher of random weights: the part of `engine.teacher.Teacher` a distillation step uses, without a tokenizer."""

from __future__ import annotations

import torch
from transformers import BertConfig, BertModel

from engine.teacher.adapter import Teacher
from engine.teacher.capture import CAPTURE


class RandomTeacher:
    """A BERT of random weights.

    Args:
        config: its shape; BERT-base where not given.
        device: where it runs.
    """

    def __init__(self, config: BertConfig | None = None, device: str = "cpu") -> None:
        config = config or BertConfig()
        torch.manual_seed(0)
        self.model = BertModel(config, add_pooling_layer=False).eval().requires_grad_(False).to(device)
        self.model.set_attn_implementation(CAPTURE)
        self.hidden_size, self.num_layers = config.hidden_size, config.num_hidden_layers
        self.num_heads = config.num_attention_heads
        self._rounded = None
        self._takes_types = True
        self.device = torch.device(device)
        self.name = "random"
        for name in ("states", "rounded", "inputs", "_forward"):
            setattr(self, name, getattr(Teacher, name).__get__(self))
        self.encoder = self.model
