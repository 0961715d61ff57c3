"""The namespace of the ops in torch.

torch has one table of ops a process. A copy of this package for the Hugging Face Hub has a namespace of its
own, so that it loads beside an installed one: .ci/hub.py writes it here.
"""

from __future__ import annotations

from typing import Any

import torch

NAMESPACE = "fastalign"
ops: Any = getattr(torch.ops, NAMESPACE)
