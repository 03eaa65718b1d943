"""A small model in the layout of BrainWideBench's public MtM, of torch's own modules."""

from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn

MODES = ("neuron", "causal", "inter_region", "intra_region")


class Theirs(nn.Module):
    """Stitcher, shared projection, tokens in front, pre-norm encoder, stitcher."""

    def __init__(self, sessions, n_bins=50, width=16, heads=4, activation="gelu"):
        super().__init__()
        self.in_stitcher = nn.ModuleDict({k: nn.Linear(n, 12) for k, n in sessions.items()})
        self.shared_proj = nn.Sequential(nn.Linear(12, 24), nn.Softsign(), nn.Linear(24, width))
        self.mask_emb, self.position_emb = nn.Embedding(4, width), nn.Embedding(n_bins, width)
        self.session_emb = nn.Embedding(len(sessions) + 1, width)
        how = {"dropout": 0.0, "activation": activation, "norm_first": True, "batch_first": True}
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, **how)
        norm = nn.LayerNorm(width)
        self.encoder = nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=False)
        self.out_stitcher = nn.ModuleDict({k: nn.Linear(width, n) for k, n in sessions.items()})
        self.rows = OrderedDict(zip(["NA", *sessions], range(len(sessions) + 1), strict=True))
        for parameter in self.parameters():  # so that biases and norms count
            parameter.data += 0.05 * torch.randn_like(parameter)

    def forward(self, counts, mode, session):
        """Latents (B, T, D) and log-rates (B, T, N)."""
        x = self.shared_proj(self.in_stitcher[session](counts)) + self.position_emb.weight
        front = [self.session_emb.weight[self.rows[session]]]
        front += [] if mode is None else [self.mask_emb.weight[MODES.index(mode)]]
        x = torch.cat([torch.stack(front).expand(len(x), -1, -1), x], dim=1)
        x = self.encoder(x)[:, len(front) :]
        return x, self.out_stitcher[session](x)

    def write(self, path, **extra):
        """Save as the benchmark's trainer does, with whatever else."""
        state = self.state_dict() | {"session_emb.vocab": self.rows}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        torch.save({"model_state_dict": state, **extra}, path)
        return path
