"""Without a GPU, Triton kernels run through its interpreter; that is chosen before their import."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ['TRITON_INTERPRET'] = '1'
