"""Settings for every test: two torch threads, so that files run beside each other do not fight for cores."""

from __future__ import annotations

import torch

torch.set_num_threads(2)
