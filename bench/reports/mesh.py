"""`python -m bench roofline --mesh`: predicted memory and time of a training step on many H100s, by mesh.

Nothing here was measured on several GPUs. The model of a step:

    compute: the head's GEMMs and passes at the H100's rates (roofline.py). The layers' GEMMs at the same
        rate, with one more forward pass, because activations are checkpointed.
    dp_shard: FSDP2 gathers weights in bf16 and reduces gradients in fp32. The head is gathered once a step,
        each layer twice.
    dp_replicate: HSDP's all-reduce of the gradients' shards, in fp32.
    tp: the layers' collectives of activations in bf16, four a pass. The head's weight is sharded by rows of
        the vocabulary: a table of 24 bytes a token a rank is gathered, and dX [N, H] is all-reduced in fp32
        beside the GEMM of dW.
    overlap: dp_shard and dp_replicate run beside the compute; tp's collectives of the layers do not.

A ring collective of B bytes over S ranks moves B (S - 1) / S through each rank, an all-reduce twice that, and
takes S - 1 hops, or twice as many. A group with g ranks in each node has g network cards to leave it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..core.operation import Shape
from .roofline import GPUS, count, predict

H100 = GPUS[0]
NODE = 8  # GPUs
MEMORY = 0.9 * 80 * 2**30  # bytes of a GPU that a run may fill: 80 GiB but for what CUDA and NCCL hold
# Bytes a second of a GPU in one direction. NVIDIA's data sheet of the H100 SXM: NVLink 900 GB/s in both
# directions. DGX H100: one ConnectX-7 of 400 Gb/s for each GPU. A real link reaches less.
NVLINK, INFINIBAND = 450e9, 50e9
# Seconds of a ring collective and of a hop of it: NCCL's own table (src/graph/tuning.cc, ring, Simple).
CALL, NVLINK_HOP, NETWORK_HOP = 8.4e-6, 3.4e-6, 9.6e-6
BF16, FP32 = 2, 4
STATE = 4 * FP32  # a trained weight: itself, its gradient, AdamW's two moments
TABLE = 24  # bytes a token that a rank of the sharded head sends (linear/sharded.py)
WORLDS = (8, 64, 1024)
TOKENS = 8192  # of a GPU and a step: one sequence


class Model(NamedTuple):
    """A Llama: layers, sizes, attention heads, heads of keys and values."""

    name: str
    layers: int
    hidden: int
    inner: int
    heads: int
    key_heads: int
    vocabulary: int

    @property
    def layer_weights(self) -> int:
        H = self.hidden
        return 2 * H * H + 2 * H * (H // self.heads) * self.key_heads + 3 * H * self.inner

    @property
    def head_weights(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def weights(self) -> int:
        """Norms, less than 0.01 %, are left out."""
        return self.layers * self.layer_weights + 2 * self.head_weights  # the embedding is not tied


# "The Llama 3 Herd of Models", table 3.
MODELS = (
    Model("8B", 32, 4096, 14336, 32, 8, 128256),
    Model("70B", 80, 8192, 28672, 64, 8, 128256),
    Model("405B", 126, 16384, 53248, 128, 8, 128256),
)


class Mesh(NamedTuple):
    """A device mesh. Ranks of a tp group are neighbours, then those of a dp_shard group."""

    dp_replicate: int
    dp_shard: int
    tp: int

    @property
    def groups(self) -> dict[str, Group]:
        """The ranks of each dimension's group, and how many of them share a node."""
        shard_in_node = min(self.dp_shard, NODE // self.tp)
        replicas_in_node = max(1, min(self.dp_replicate, NODE // (self.tp * shard_in_node)))
        return {
            "dp_replicate": Group(self.dp_replicate, replicas_in_node),
            "dp_shard": Group(self.dp_shard, shard_in_node),
            "tp": Group(self.tp, self.tp),
        }


class Group(NamedTuple):
    """The ranks of a collective, and how many of them are in each node."""

    ranks: int
    in_node: int

    def seconds(self, size: float, *, rounds: int = 1) -> float:
        """Time of a ring collective over `size` bytes: rounds 1 gathers or reduce-scatters, 2 all-reduces."""
        if self.ranks == 1:
            return 0.0
        nodes = self.ranks // self.in_node
        rate = NVLINK if nodes == 1 else min(NVLINK, INFINIBAND * self.in_node)
        hops = (self.ranks - nodes) * NVLINK_HOP + (nodes - 1) * NETWORK_HOP
        return CALL + rounds * (hops + size * (self.ranks - 1) / self.ranks / rate)


class Head(NamedTuple):
    """A step's head on one GPU: seconds and bytes."""

    compute: float
    data_parallel: float  # gathering the weight, reducing its gradient
    tensor_parallel: float  # the table, and what of dX's all-reduce is not beside dW's GEMM
    memory: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.data_parallel) + self.tensor_parallel

    @property
    def bound(self) -> str:
        """What decides the head's time."""
        return "compute" if self.compute >= self.data_parallel else "dp"


class Step(NamedTuple):
    """A training step on one GPU: seconds and bytes, the head's among them."""

    head: Head
    seconds: float
    memory: float

    @property
    def fits(self) -> bool:
        return self.memory <= MEMORY


def predict_head(model: Model, mesh: Mesh, tokens: int = TOKENS) -> Head:
    """The head of a step of `tokens` tokens a GPU; a tp group shares its tokens and its vocabulary."""
    N, H, V = tokens * mesh.tp, model.hidden, -(-model.vocabulary // mesh.tp)
    groups = mesh.groups
    work = count("linear_cross_entropy", "bf16", ["hidden", "weight"], Shape(N, H, V), "cuda", 90)
    assert work is not None
    compute = predict(work, H100, "bf16").seconds
    dX = groups["tp"].seconds(FP32 * N * H, rounds=2)
    beside_dW = 2.0 * N * H * V / H100.rate("bf16")
    return Head(
        compute,
        _data_parallel(mesh, V * H, gathers=1),
        groups["tp"].seconds(TABLE * N * mesh.tp) + max(0.0, dX - beside_dW),
        STATE * V * H / mesh.dp_shard + (BF16 + FP32) * V * H * (mesh.dp_shard > 1) + work.held_bytes,
    )


def predict_step(model: Model, mesh: Mesh, tokens: int = TOKENS) -> Step:
    """A whole step. The embedding costs its memory and its collectives; its lookups cost nothing."""
    head = predict_head(model, mesh, tokens)
    N, H, layers = tokens * mesh.tp, model.hidden, model.layers
    per_gpu = layers * model.layer_weights / mesh.tp
    # A forward pass, one more for the checkpoints, and a backward pass of two; causal attention sees half the
    # keys of its sequence.
    flops = 4 * (2 * N * per_gpu + layers * 2 * N * tokens * H / mesh.tp)
    embedding = model.head_weights / mesh.tp
    communication = head.data_parallel + _data_parallel(mesh, embedding, gathers=1)
    communication += layers * _data_parallel(mesh, model.layer_weights / mesh.tp, gathers=2)
    # Forward: a gather and a reduce-scatter around attention and around the MLP; the checkpoints' forward and
    # the backward as many.
    between_layers = 3 * 2 * layers * 2 * mesh.groups["tp"].seconds(BF16 * N * H)
    shard = model.weights / (mesh.tp * mesh.dp_shard)
    adamw = 7 * FP32 * shard / (H100.bytes * H100.byte_share)
    compute = head.compute + flops / H100.rate("bf16")
    seconds = max(compute, communication) + between_layers + head.tensor_parallel + adamw
    # Beside the states: two gathered layers with a gradient, the checkpoints, and the head or the activations
    # of one layer, whichever is more.
    layer = model.layer_weights / mesh.tp * (2 * BF16 + BF16 + FP32) * (mesh.dp_shard > 1)
    checkpoints = BF16 * layers * tokens * H
    # Bytes of one layer, in bf16 (Korthikanti et al. 2022)
    activations = tokens * (34 * H + 3 * BF16 * model.inner)
    memory = STATE * shard + layer + checkpoints
    head_state = STATE * embedding / mesh.dp_shard
    return Step(head, seconds, memory + max(head.memory - head_state, activations))


def _data_parallel(mesh: Mesh, weights: float, *, gathers: int) -> float:
    """FSDP2's gathers of bf16 weights, reduction of fp32 gradients, and HSDP's all-reduce of shards."""
    shard, replicate = mesh.groups["dp_shard"], mesh.groups["dp_replicate"]
    return (
        gathers * shard.seconds(BF16 * weights)
        + shard.seconds(FP32 * weights)
        + replicate.seconds(FP32 * weights / mesh.dp_shard, rounds=2)
    )


def meshes(world: int) -> Iterator[Mesh]:
    """All meshes of powers of two whose tp groups lie within a node."""
    for tp in (1, 2, 4, 8):
        shard = world // tp
        while shard:
            yield Mesh(world // tp // shard, shard, tp)
            shard //= 2


def fastest(
    model: Model, world: int, tokens: int = TOKENS, *, tp: Sequence[int] = (1, 2, 4, 8)
) -> Mesh | None:
    """The mesh with the shortest step among those that fit the memory; None if none fits.

    Meshes within 1 % of it count as equal, and the head with the least traffic decides: on a slower network
    this traffic is the first that compute no longer hides.
    """
    steps = {mesh: predict_step(model, mesh, tokens) for mesh in meshes(world) if mesh.tp in tp}
    steps = {mesh: step for mesh, step in steps.items() if step.fits}
    shortest = min((step.seconds for step in steps.values()), default=0.0)
    near = [mesh for mesh, step in steps.items() if step.seconds <= 1.01 * shortest]
    return min(near, key=lambda mesh: steps[mesh].head.data_parallel, default=None)


def hidden_from(model: Model, mesh: Mesh) -> int:
    """Tokens a GPU, in multiples of 256, from which the head computes longer than its weight travels.

    From there on the head is bound by its GEMMs, on however many GPUs.
    """
    tokens = 256
    while predict_head(model, mesh, tokens).bound != "compute":
        tokens += 256
    return tokens


HEADER = (
    "| model, GPUs | mesh: dp_replicate × dp_shard × tp | GiB a GPU (of the head) | head, ms: compute "
    "| its dp traffic | its tp traffic | step, ms | head's share | compute hides dp from, tokens a GPU |"
)


def table(tokens: int = TOKENS) -> str:
    """The predictions as Markdown: for each model and world the fastest mesh, and the fastest with tp = 8."""
    lines = [
        f"Predicted, not measured: H100 {H100.rate('bf16') / 1e12:.0f} TFLOP/s in bf16, "
        f"{H100.bytes * H100.byte_share / 1e12:.1f} TB/s, NVLink {NVLINK / 1e9:.0f} GB/s a direction, "
        f"InfiniBand {INFINIBAND / 1e9:.0f} GB/s a GPU; {tokens:,} tokens a GPU and step, cross-entropy.",
        "",
        HEADER,
        "|" + " --- |" * (HEADER.count("|") - 1),
    ]
    for model in MODELS:
        for world in WORLDS:
            best = fastest(model, world, tokens)
            sharded = fastest(model, world, tokens, tp=(8,))
            if best is None:
                least = min(meshes(world), key=lambda mesh: predict_step(model, mesh, tokens).memory)
                needed = predict_step(model, least, tokens).memory / 2**30
                name = " × ".join(map(str, least))
                lines.append(
                    f"| {model.name}, {world:,} | none fits: {name} takes | {needed:.0f} |" + " – |" * 6
                )
            for mesh in dict.fromkeys(mesh for mesh in (best, sharded) if mesh is not None):
                lines.append(_line(model, world, mesh, tokens))
    return "\n".join(lines)


def _line(model: Model, world: int, mesh: Mesh, tokens: int) -> str:
    step = predict_step(model, mesh, tokens)
    head = step.head
    cells = [
        f"{model.name}, {world:,}",
        " × ".join(map(str, mesh)),
        f"{step.memory / 2**30:.0f} ({head.memory / 2**30:.1f})",
        f"{head.compute * 1e3:.1f}",
        f"{head.data_parallel * 1e3:.1f}",
        f"{head.tensor_parallel * 1e3:.1f}",
        f"{step.seconds * 1e3:,.0f}",
        f"{head.seconds / step.seconds:.1%}",
        f"{hidden_from(model, mesh):,}",
    ]
    return f"| {' | '.join(cells)} |"
