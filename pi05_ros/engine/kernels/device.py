"""What a GPU offers to one block of threads."""

from __future__ import annotations

from functools import cache

import torch


@cache
def shared_memory_bytes(device: torch.device) -> int:
    """Return the shared memory that one block may take; 0 where there is no GPU."""
    if device.type != 'cuda':
        return 0
    properties = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
