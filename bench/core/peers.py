"""The peers that fastalign is measured against, and which are installed: `python -m bench.core.peers`."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch


class Peer(NamedTuple):
    """A distribution, what the suite measures of it, and whether it needs a GPU."""

    package: str
    measured: str
    gpu_only: bool = False


PEERS = (
    Peer("torch", "plain losses, torch.compile of them, F.linear_cross_entropy (2.13 and newer)"),
    Peer("liger-kernel", "fused linear CE, Scaled CE, CE, DPO, KTO"),
    Peer("trl", "ChunkedLogProbFunction, selective_log_softmax_and_entropy"),
    Peer("transformers", "the warpers of generate; the models of the whole steps"),
    Peer("cut-cross-entropy", "Apple's CCE, filtered and exact", gpu_only=True),
    Peer("quack-kernels", "chunked linear CE and CE", gpu_only=True),
    Peer("flash-attn", "cross-entropy from logits", gpu_only=True),
    Peer("flashinfer-python", "sampling", gpu_only=True),
)


def found() -> dict[str, str]:
    """The version of each peer, or why it is not measured here."""
    gpu = torch.cuda.is_available()
    return {
        peer.package: "absent: needs a GPU" if peer.gpu_only and not gpu else _version(peer.package)
        for peer in PEERS
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent: not installed"


if __name__ == "__main__":
    for peer, state in zip(PEERS, found().values()):
        print(f"{peer.package:18} {state:28} {peer.measured}")
