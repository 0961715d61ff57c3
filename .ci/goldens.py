"""Record what fastalign computes on a CPU, bit for bit, and compare another commit with the record.

    python .ci/goldens.py record FILE
    python .ci/goldens.py compare FILE

`compare` prints one line for each difference and exits with status 1 if there is one. Wording that may change (the text
of --help, the custom ops' names) is reported as "changed" and does not fail. Only public names are used, so the script runs
on any commit of PYTHONPATH. Every part runs in a process of its own with one thread.

To see one case again: `python .ci/goldens.py show functions CASE`, with CASE as `compare` prints it.
"""

# ruff: noqa: E501 - deleted with issue 15
import argparse
import contextlib
import dataclasses
import hashlib
import inspect
import io
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# part -> (environment, whether the native library is hidden)
PARTS = {
    "functions": ({}, False),
    "functions, FASTALIGN_GEMM=torch": ({"FASTALIGN_GEMM": "torch"}, False),
    "functions, no native library": ({}, True),
    "rest": ({}, False),
    "stages": ({}, False),
}
MAY_CHANGE = ("help text", "op ", "signature text")
SEEDS = 140
Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("record", "compare", "part", "show"))
    parser.add_argument("file")
    parser.add_argument("case", nargs="?")
    given = parser.parse_args()
    if given.action == "part":
        json.dump(part(given.file), sys.stdout)
    elif given.action == "show":
        show(given.file, given.case)
    elif given.action == "record":
        Path(given.file).write_text(json.dumps(record(), indent=0, sort_keys=True))
    else:
        sys.exit(compare(json.loads(Path(given.file).read_text()), record()))


def record() -> Record:
    """All parts, two processes at a time."""

    def run(name: str) -> Record:
        started = time.monotonic()
        environment = (
            os.environ
            | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
            | PARTS[name][0]
        )
        done = subprocess.run(
            [sys.executable, __file__, "part", name],
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(f"goldens: {name} failed:\n{done.stderr[-4000:]}")
        print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr)
        return json.loads(done.stdout)

    with ThreadPoolExecutor(2) as pool:
        order = sorted(PARTS, key=lambda name: name != "stages")  # the longest first
        return dict(zip(order, pool.map(run, order)))


def compare(before: Record, now: Record) -> int:
    """Print each difference; the number of those that may not be."""
    failed, changed = 0, 0
    for name in PARTS:
        old, new = before[name], now[name]
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) == new.get(key):
                continue
            fine = key.startswith(MAY_CHANGE) or planned_on(key, old.get(key, ""), new.get(key, ""))
            failed, changed = failed + (not fine), changed + fine
            print(
                f"{'changed' if fine else 'DIFFERENT'} | {name} | {key} | was {old.get(key, 'absent')} | is {new.get(key, 'absent')}"[
                    :600
                ]
            )
    print(
        f"goldens: {sum(map(len, before.values()))} recorded, {failed} different, {changed} changed in wording"
    )
    return int(failed > 0)


def planned_on(key: str, old: str, new: str) -> bool:
    """Whether a plan has its old fields and new ones after them, or is a GPU's, which has other engines now."""
    return (
        key.endswith("HeadPlan")
        or key.startswith("plan ")
        and ("'cuda'" in key or new.startswith(old.rstrip(")")))
    )


def part(name: str) -> Record:
    hidden = PARTS[name][1]
    if hidden:
        exists = Path.exists
        Path.exists = lambda self, **options: self.name != "_native.so" and exists(self, **options)  # type: ignore[method-assign]
    import torch

    torch.set_num_threads(1)
    with contextlib.redirect_stdout(sys.stderr):
        if name == "stages":
            return stages()
        if name == "rest":
            return names() | helps() | plans() | modules() | models()
        found = functions()
        import fastalign_kernels  # noqa: F401

        assert hasattr(torch.ops.fastalign, "row_stats") != hidden, (
            "the native library is there, or not, against the part"
        )
        return found


def digest(x: Any) -> str:
    """A tensor as the hash of its bytes, dtype, shape and first values; anything else as its repr."""
    import torch

    if not isinstance(x, torch.Tensor):
        return repr(x)
    flat = x.detach().contiguous().flatten()
    hashed = hashlib.sha256(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"").hexdigest()[
        :16
    ]
    values = " ".join(f"{v:.9g}" for v in flat[:3].double().tolist())
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)} {hashed} ({values} ...)"


# Functions: seeded draws of tensors and options.

R = random.Random


def maybe(r: R, value: Any, otherwise: Any = None, chance: float = 0.5) -> Any:
    return value if r.random() < chance else otherwise


def log_uniform(r: R, low: float, high: float) -> float:
    return math.exp(r.uniform(math.log(low), math.log(high)))


def size(r: R, most: int) -> int:
    if r.random() < 0.3:
        return min(most, max(1, 2 ** r.randrange(0, 9) + r.choice((-1, 0, 1))))
    return max(1, round(log_uniform(r, 1, most)))


def strided(r: R, x: Any) -> Any:
    import torch

    kind = r.randrange(6)
    if kind == 0 and x.dim():
        return torch.stack([x, x], -1).flatten(-2)[..., ::2]
    if kind == 1 and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    return x


def floats(r: R, shape: tuple[int, ...], dtype: Any, scale: float = 1.0) -> Any:
    import torch

    x = (
        torch.randn(shape, generator=torch.Generator().manual_seed(r.getrandbits(40)), dtype=torch.float64)
        * scale
    )
    return strided(r, x.to(dtype))


def whole(r: R, high: int, shape: tuple[int, ...]) -> Any:
    import torch

    x = torch.randint(0, high, shape, generator=torch.Generator().manual_seed(r.getrandbits(40)))
    return strided(r, x.to(r.choice((torch.int64, torch.int64, torch.int32))))


def truths(r: R, shape: tuple[int, ...], share: float) -> Any:
    import torch

    return torch.rand(shape, generator=torch.Generator().manual_seed(r.getrandbits(40))) < share


def spoil(r: R, x: Any, *values: float) -> Any:
    if x.numel() and r.random() < 0.05:
        x = x.clone()
        x[tuple(r.randrange(length) for length in x.shape)] = r.choice(values)
    return x


def accumulator(dtype: Any) -> Any:
    import torch

    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclasses.dataclass
class Call:
    """A call of a public function: `trained` names the tensors that get gradients."""

    function: str
    tensors: dict[str, Any]
    options: dict[str, Any]
    trained: tuple[str, ...] = ()


def bounds(r: R, n: int, parts: int | None = None) -> Any:
    import torch

    ends = sorted(r.randint(0, n) for _ in range(r.randint(0, 4) if parts is None else parts - 1))
    return torch.tensor([0, *ends, n], dtype=r.choice((torch.int32, torch.int64)))


def ids_of(r: R, V: int, shape: tuple[int, ...], options: dict[str, Any]) -> Any:
    import torch

    ignore = r.choice((-100, -100, -1, r.randrange(V), None))
    if ignore != -100 or r.random() < 0.5:
        options["ignore_index"] = ignore
    ids = whole(r, V, shape)
    value = -100 if ignore is None else ignore
    return torch.where(
        truths(r, shape, r.choice((0.0, 0.0, 0.3, 0.9, 1.0))), torch.tensor(value, dtype=ids.dtype), ids
    )


def transforms(r: R, *, scaled: bool) -> dict[str, Any]:
    options = {
        "temperature": maybe(r, log_uniform(r, 0.1, 5), 1.0),
        "softcap": maybe(r, log_uniform(r, 1, 60), None, 0.3),
    }
    if scaled:
        options["logit_scale"] = maybe(r, r.choice((-1, 1, 1)) * log_uniform(r, 0.05, 3), 1.0)
    return options


def loss_of_tokens(r: R, shape: tuple[int, ...], dtype: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    import torch

    options: dict[str, Any] = {
        "label_smoothing": maybe(r, r.random(), 0.0, 0.3),
        "z_loss": maybe(r, log_uniform(r, 1e-4, 0.1), 0.0, 0.3),
    }
    options["reduction"] = r.choice(("mean", "mean", "sum", "none"))
    if r.random() < 0.3:
        tensors["token_weights"] = floats(r, shape, accumulator(dtype)).abs() + 0.1
    if options["reduction"] == "mean" and r.random() < 0.3:
        options["num_items"] = r.choice((log_uniform(r, 0.5, 100), torch.tensor(r.randint(1, 50))))
    return options


def lead(r: R, most: int = 40) -> tuple[int, ...]:
    return r.choice([(size(r, most),), (size(r, 6), size(r, 8))])


def draw_logits(r: R, dtype: Any) -> Call:
    shape, V = lead(r), size(r, 700)
    options = transforms(r, scaled=False)
    logits = spoil(r, floats(r, (*shape, V), dtype, r.choice((0.01, 1, 5, 300))), -math.inf, math.nan, 6e4)
    tensors = {"logits": logits, "ids": ids_of(r, V, shape, options)}
    kind = r.choice(("cross_entropy", "cross_entropy", "token_logprobs", "token_stats"))
    if kind == "cross_entropy":
        tensors["targets"] = tensors.pop("ids")
        options |= loss_of_tokens(r, shape, dtype, tensors) | {"inplace_backward": r.random() < 0.3}
    elif kind == "token_stats":
        options["entropy"] = r.random() < 0.7
    return Call(kind, tensors, options, maybe(r, ("logits",), (), 0.85))


def head(r: R, dtype: Any, shape: tuple[int, ...]) -> Call:
    import torch

    large = r.random() < 0.08
    H, V = (r.choice((96, 130)), r.choice((1500, 2049))) if large else (size(r, 70), max(size(r, 500), 2))
    options = transforms(r, scaled=True)
    master = torch.float32 if dtype == torch.bfloat16 and r.random() < 0.3 else dtype
    weight = floats(r, (V, H), master, r.choice((0.1, 1, 1, 3)) / H**0.5)
    tensors = {"hidden": floats(r, (*shape, H), dtype), "weight": weight, "ids": ids_of(r, V, shape, options)}
    trained = r.choice((("hidden", "weight"), ("hidden", "weight"), ("hidden",), ("weight",), ()))
    if r.random() < 0.4:
        tensors["bias"] = floats(r, (V,), master)
        trained = (*trained, "bias") if "weight" in trained else trained
    tensors["hidden"] = spoil(r, tensors["hidden"], math.nan, math.inf)
    if r.random() < 0.6:
        options["workspace_mib"] = log_uniform(r, 1, 60) * 8 * V / 2**20
    if r.random() < 0.25:
        options["tail_eps"] = log_uniform(r, 1e-6, 0.2)
    return Call("", tensors, options, trained)


def draw_linear_ce(r: R, dtype: Any) -> Call:
    shape = lead(r)
    call = head(r, dtype, shape)
    call.function = r.choice(("linear_cross_entropy", "linear_cross_entropy", "linear_cross_entropy_stats"))
    call.tensors["targets"] = call.tensors.pop("ids")
    call.options |= loss_of_tokens(r, shape, dtype, call.tensors)
    if "tail_eps" in call.options and call.options["softcap"]:
        call.options["label_smoothing"] = 0.0
    if "token_weights" in call.tensors and "tail_eps" not in call.options and r.random() < 0.5:
        call.trained = (*call.trained, "token_weights")
    return call


def draw_tail_report(r: R, dtype: Any) -> Call:
    call = head(r, dtype, lead(r))
    call.function, call.trained = "tail_report", ()
    call.tensors["targets"] = call.tensors.pop("ids")
    call.options["tail_eps"] = log_uniform(r, 1e-6, 0.2)
    return call


def draw_token_stats(r: R, dtype: Any) -> Call:
    call = head(r, dtype, lead(r))
    call.function = r.choice(("linear_logprobs", "linear_token_stats"))
    if call.function == "linear_token_stats":
        call.options["entropy"] = r.random() < 0.7
    return call


def policy_inputs(r: R, dtype: Any, shape: tuple[int, ...], *, packed: bool, in_head: bool) -> Call:
    import torch

    mask = truths(r, shape, r.choice((0.0, 0.5, 0.9, 1.0)))
    mask = r.choice((mask, mask, mask.long(), mask.float()))
    spread, kind = r.choice((0.1, 0.5, 30)), accumulator(dtype) if in_head else dtype
    logp = -floats(r, shape, kind, 2).abs()

    def near() -> Any:
        return (logp.double() + floats(r, shape, torch.float64, spread)).to(kind)

    tensors = {"logp": logp, "old_logp": near(), "advantages": floats(r, shape, kind)}
    options: dict[str, Any] = {
        "clip": maybe(r, r.uniform(0.01, 0.9), None, 0.8),
        "clip_high": maybe(r, r.uniform(0.01, 2), None, 0.4),
    }
    options |= {
        "dual_clip": maybe(r, r.uniform(1.01, 5), None, 0.4),
        "aggregation": r.choice(("token_mean", "sequence_mean", "sum")),
    }
    if r.random() < 0.5:
        options["entropy_coefficient"] = maybe(r, r.uniform(-0.1, 0.1), 0.0)
        if not in_head:
            tensors["entropy"] = floats(r, shape, kind).abs()
    if r.random() < 0.5:
        tensors["reference_logp"] = near()
        options |= {
            "kl_coefficient": maybe(r, r.uniform(0.01, 0.5), 0.0),
            "kl_estimator": r.choice(("k1", "k2", "k3")),
        }
    tensors = {name: spoil(r, x, math.nan) for name, x in tensors.items()} | {"mask": mask}
    if r.random() < 0.1:
        tensors["old_logp"] = None
    if options["aggregation"] != "sequence_mean" or r.random() < 0.3:
        options["normalizer"] = r.choice((None, r.uniform(0.5, 50), torch.tensor(r.randint(1, 90))))
    if packed:
        tensors["cu_seqlens"] = bounds(r, shape[0])
    return Call("ppo_loss", tensors, options, ("logp", "entropy") if "entropy" in tensors else ("logp",))


def draw_linear_ppo(r: R, dtype: Any) -> Call:
    packed = r.random() < 0.4
    shape = (size(r, 40),) if packed else (size(r, 5), size(r, 9))
    call, policy = head(r, dtype, shape), policy_inputs(r, dtype, shape, packed=packed, in_head=True)
    policy.tensors.pop("logp")
    return Call("linear_ppo_loss", call.tensors | policy.tensors, call.options | policy.options, call.trained)


def sequences(r: R, S: int) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The leading shape of S sequences and their bounds, where they are packed."""
    if r.random() < 0.5:
        N = size(r, 40)
        return (N,), {"cu_seqlens": bounds(r, N, S)}
    return (S, size(r, 8)), {}


def add_reference(r: R, call: Call, dtype: Any, S: int) -> None:
    if r.random() < 0.5:
        call.tensors["reference_logps"] = -floats(r, (S,), accumulator(dtype), 3).abs()
        return
    hidden, weight = call.tensors["hidden"], call.tensors["weight"]
    call.tensors["reference_hidden"] = floats(r, tuple(hidden.shape), dtype)
    call.tensors["reference_weight"] = floats(r, tuple(weight.shape), weight.dtype, 0.3)
    if "bias" in call.tensors:
        call.tensors["reference_bias"] = floats(r, tuple(call.tensors["bias"].shape), weight.dtype)


PAIRS = (
    "sigmoid",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
    "sigmoid_norm",
)


def pair_options(r: R) -> dict[str, Any]:
    loss_type = r.choice(PAIRS)
    smoothed = loss_type in ("sigmoid", "sigmoid_norm", "robust", "exo_pair")
    smoothing = r.uniform(1e-3, 0.45) if loss_type == "exo_pair" or (smoothed and r.random() < 0.5) else 0.0
    return {"beta": log_uniform(r, 0.01, 3), "loss_type": loss_type, "label_smoothing": smoothing}


def draw_linear_dpo(r: R, dtype: Any) -> Call:
    S = 2 * size(r, 4)
    shape, packed = sequences(r, S)
    call = head(r, dtype, shape)
    call.function = "linear_dpo_loss"
    call.tensors |= packed
    add_reference(r, call, dtype, S)
    call.options |= pair_options(r)
    return call


def draw_linear_kto(r: R, dtype: Any) -> Call:
    S = size(r, 6)
    shape, packed = sequences(r, S)
    call = head(r, dtype, shape)
    call.function = "linear_kto_loss"
    call.tensors |= packed
    add_reference(r, call, dtype, S)
    call.tensors |= {"desirable": truths(r, (S,), 0.5), "kl": floats(r, (), accumulator(dtype)).abs()}
    call.options |= {
        "beta": log_uniform(r, 0.01, 2),
        "desirable_weight": r.uniform(0.1, 2),
        "undesirable_weight": r.uniform(0.1, 2),
    }
    if r.random() < 0.3:
        call.tensors["kl"] = None
        call.options["loss_type"] = "apo_zero_unpaired"
    return call


def logps(r: R, dtype: Any, S: int) -> Any:
    return spoil(r, -floats(r, (S,), dtype, r.choice((1e-3, 3, 30, 1000))).abs(), -math.inf, math.nan)


def draw_pairs(r: R, dtype: Any) -> Call:
    S = size(r, 50)
    policy = ("policy_chosen_logps", "policy_rejected_logps")
    tensors = {name: logps(r, dtype, S) for name in policy}
    lengths = {name: whole(r, 60, (S,)) for name in ("chosen_lengths", "rejected_lengths")}
    reduction = {"reduction": r.choice(("mean", "sum", "none"))}
    kind = r.choice(("dpo_loss", "dpo_loss", "dpo_loss", "simpo_loss", "orpo_loss", "cpo_loss"))
    if kind == "dpo_loss":
        options = pair_options(r) | reduction
        tensors |= {
            name: logps(r, dtype, S) for name in ("reference_chosen_logps", "reference_rejected_logps")
        }
        if options["loss_type"] in ("ipo", "sigmoid_norm"):
            tensors |= lengths
        return Call(kind, tensors, options, policy)
    options = {"beta": log_uniform(r, 0.05, 4), "alpha": r.uniform(0, 2), **reduction}
    if kind == "cpo_loss":
        tensors |= maybe(r, {"chosen_lengths": lengths["chosen_lengths"]}, {})
    else:
        tensors |= lengths
    if kind == "simpo_loss":
        options["gamma"] = r.uniform(-1, 3)
    if kind != "orpo_loss":
        options["label_smoothing"] = maybe(r, r.uniform(0, 0.49), 0.0)
    return Call(kind, tensors, options, policy)


def draw_unpaired(r: R, dtype: Any) -> Call:
    S = size(r, 50)
    tensors = {
        "policy_logps": logps(r, dtype, S),
        "reference_logps": logps(r, dtype, S),
        "desirable": truths(r, (S,), 0.5),
    }
    tensors["kl"] = floats(r, (), accumulator(dtype)).abs()
    options: dict[str, Any] = {
        "beta": log_uniform(r, 0.01, 3),
        "desirable_weight": r.uniform(0.1, 3),
        "undesirable_weight": r.uniform(0.1, 3),
    }
    options |= {
        "loss_type": r.choice(("kto", "kto", "apo_zero_unpaired")),
        "reduction": r.choice(("mean", "sum", "none")),
    }
    if options["loss_type"] != "kto":
        tensors["kl"] = None
    return Call("kto_loss", tensors, options, ("policy_logps",))


def draw_small(r: R, dtype: Any) -> Call:
    """reward_loss, kto_kl and sum_by_sequence."""
    S, kind = size(r, 50), r.choice(("reward_loss", "kto_kl", "sum_by_sequence"))
    if kind == "kto_kl":
        names = ("policy_mismatched_logps", "reference_mismatched_logps")
        return Call(kind, {name: logps(r, dtype, S) for name in names}, {})
    if kind == "sum_by_sequence":
        N = size(r, 200)
        return Call(
            kind,
            {"values": floats(r, (N,), dtype), "cu_seqlens": bounds(r, N)},
            {"mean": r.random() < 0.5},
            ("values",),
        )
    tensors = {"chosen_scores": floats(r, (S,), dtype, 3), "rejected_scores": floats(r, (S,), dtype, 3)}
    tensors |= maybe(r, {"margin": floats(r, (S,), dtype)}, {})
    return Call(
        kind, tensors, {"center_coefficient": maybe(r, r.random(), 0.0)}, ("chosen_scores", "rejected_scores")
    )


def draw_ppo(r: R, dtype: Any) -> Call:
    packed = r.random() < 0.4
    shape = (size(r, 60),) if packed else (size(r, 7), size(r, 30))
    return policy_inputs(r, dtype, shape, packed=packed, in_head=False)


def draw_values(r: R, dtype: Any) -> Call:
    """value_loss, gae and masked_whiten."""
    shape = (size(r, 7), size(r, 60))
    mask = truths(r, shape, r.choice((0.0, 0.5, 0.9, 1.0)))
    mask = r.choice((mask, mask.long(), mask.float()))
    kind = r.choice(("value_loss", "gae", "masked_whiten"))
    if kind == "masked_whiten":
        x = floats(r, shape, dtype, r.choice((1, 1, 1e-3, 100)))
        return Call(
            kind, {"x": x, "mask": mask}, {"shift_mean": r.random() < 0.5, "eps": r.choice((1e-8, 1e-5))}
        )
    values = floats(r, shape, dtype)
    if kind == "gae":
        tensors = {"rewards": floats(r, shape, dtype), "values": values, "mask": mask}
        tensors |= maybe(r, {"bootstrap": floats(r, shape[:1], dtype)}, {})
        return Call(
            kind,
            tensors,
            {"gamma": r.choice((1.0, r.random())), "lam": r.choice((0.95, 1.0, 0.0, r.random()))},
        )
    tensors = {"values": values, "old_values": floats(r, shape, dtype), "returns": floats(r, shape, dtype)}
    tensors = {name: spoil(r, x, math.nan) for name, x in tensors.items()} | {"mask": mask}
    return Call(
        kind,
        tensors,
        {"clip": maybe(r, r.uniform(0.01, 1), None, 0.8), "normalizer": r.choice((None, r.uniform(0.5, 50)))},
        ("values",),
    )


def draw_sample(r: R, dtype: Any) -> Call:
    import torch

    B, V = size(r, 6), size(r, 3000)
    words = -(-V // 32)

    def a_row(low: float, high: float) -> Any:
        return r.choice(
            (
                r.uniform(low, high),
                torch.rand(B, generator=torch.Generator().manual_seed(r.getrandbits(40))) * (high - low)
                + low,
            )
        )

    def bits() -> Any:
        return torch.randint(
            -(2**31), 2**31, (B, words), generator=torch.Generator().manual_seed(r.getrandbits(40))
        ).to(torch.int32)

    options: dict[str, Any] = {"seed": r.getrandbits(40), "temperature": r.choice((0.0, 1.0, a_row(0.3, 2)))}
    options |= {"top_p": r.choice((1.0, a_row(0.05, 1))), "min_p": r.choice((0.0, 0.0, a_row(0, 0.5)))}
    options["top_k"] = r.choice(
        (0, r.randint(1, V), torch.randint(0, V + 1, (B,), generator=torch.Generator().manual_seed(1)))
    )
    if r.random() < 0.4:
        options |= {"repetition_penalty": a_row(0.5, 2), "seen": bits()}
    options |= maybe(r, {"allowed": bits()}, {}, 0.3) | maybe(
        r, {"finished": truths(r, (B,), 0.4), "pad_id": 0}, {}, 0.3
    )
    if r.random() < 0.5:
        options |= {"sequence_ids": torch.arange(B) * 3, "positions": torch.arange(B) + 5}
    logits = spoil(r, floats(r, (B, V), dtype, r.choice((0.01, 1, 4, 30))), math.nan, -math.inf)
    return Call("sample", {"logits": logits}, options)


DRAWS = (
    draw_logits, draw_linear_ce, draw_linear_ce, draw_token_stats, draw_token_stats, draw_linear_ppo, draw_linear_dpo, draw_linear_kto,
    draw_tail_report, draw_pairs, draw_unpaired, draw_small, draw_ppo, draw_values, draw_sample,
)  # fmt: skip


def call_of(case: str) -> tuple[Call, int]:
    import torch

    number, seed, kind = case.split()[0].split(".")
    r = R(f"{number} {seed}")
    return DRAWS[int(number)](r, getattr(torch, kind)), r.getrandbits(40)


def run(call: Call, seed: int, *, twice: bool, autocast: bool) -> Record:
    """Outputs and the gradients of their sum with a random upstream gradient."""
    import torch

    import fastalign_kernels as k

    leaves = {
        n: x if x is None else x.detach().clone().requires_grad_(n in call.trained)
        for n, x in call.tensors.items()
    }
    read = leaves
    if call.options.get("inplace_backward"):  # which writes into its logits
        read = leaves | {"logits": leaves["logits"] * 1}
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            result = getattr(k, call.function)(**read, **call.options)
        fields = list(zip(result._fields, result)) if hasattr(result, "_fields") else [("result", result)]
        found = {name: digest(x) for name, x in fields}
        generator = torch.Generator().manual_seed(seed)
        total: Any = 0
        for _, x in fields:
            if isinstance(x, torch.Tensor) and x.requires_grad:
                total = (
                    total
                    + (x.double() * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum()
                )
        if isinstance(total, torch.Tensor):
            wanted = [leaves[name] for name in call.trained]
            for again in ("", "again ")[: 1 + twice]:
                grads = torch.autograd.grad(total, wanted, allow_unused=True, retain_graph=twice)
                found |= {f"{again}d {name}": digest(g) for name, g in zip(call.trained, grads)}
    except (ValueError, TypeError, RuntimeError) as error:
        return {"raises": type(error).__name__}
    return found


def functions() -> Record:
    """Every public function over its options."""
    import torch

    import fastalign_kernels as k

    found = {}
    for number in range(len(DRAWS)):
        for seed in range(SEEDS):
            kind = ("float32", "bfloat16", "float16", "float64")[seed % 4 if seed < 40 else seed % 2]
            call, upstream = call_of(f"{number}.{seed}.{kind}")
            twice = seed % 5 == 0 and not call.options.get("inplace_backward")
            autocast = seed % 7 == 0 and "hidden" in call.tensors
            outputs = run(call, upstream, twice=twice, autocast=autocast)
            if "tail_eps" in call.options:
                outputs["kept_share"] = repr(k.kept_share())
            found |= {
                f"{number}.{seed}.{kind} {call.function}: {name}": value for name, value in outputs.items()
            }
    logits, ids = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)), torch.arange(3)
    for name, transformed in (
        ("grad", torch.func.grad(lambda x: k.cross_entropy(x, ids))),
        ("vmap", torch.func.vmap(lambda x: k.token_logprobs(x, ids[0]))),
    ):
        try:
            found[f"torch.func.{name}"] = digest(transformed(logits))
        except Exception as error:
            found[f"torch.func.{name}"] = f"raises {type(error).__name__}"
    return found


def show(name: str, case: str) -> None:
    call, seed = call_of(case)
    print(
        call.function,
        {n: (x if x is None or x.dim() == 0 else (tuple(x.shape), x.dtype)) for n, x in call.tensors.items()},
    )
    print(call.options, "gradients of", call.trained)
    print(json.dumps(run(call, seed, twice=False, autocast=False), indent=1))


# Names, help, plans, modules and models.


def signature(thing: Any) -> str:
    """Names, kinds and defaults of the parameters, without annotations."""
    if not callable(thing):
        return ""
    try:
        parameters = inspect.signature(thing).parameters.values()
    except ValueError:
        return ""
    return ", ".join(
        f"{p.kind.name[:10]} {p.name}={'' if p.default is p.empty else p.default!r}" for p in parameters
    )


def names() -> Record:
    import torch

    import fastalign
    import fastalign_kernels
    from fastalign import actor_critic, causal_lm, classifier, measure, nn, rollout

    found = {}
    for module in (fastalign, fastalign_kernels):
        for name in module.__all__:
            thing = getattr(module, name)
            if name != "__version__":
                found[f"name {module.__name__}.{name}"] = (
                    f"{type(thing).__name__}({signature(thing)}) {getattr(thing, '_fields', '')}"
                )
    documented = {
        nn: ("CrossEntropyLoss", "LinearCrossEntropyLoss", "LinearDPOLoss", "LinearKTOLoss", "LinearPPOLoss"),
        rollout: ("generate", "custom_generate", "Rollout", "RolloutOutput"),
        causal_lm: ("fuse_head", "unfuse_head", "backbone", "FusedCausalLMOutput"),
        classifier: ("score_packed",),
        actor_critic: ("ActorCritic",),
        measure: (
            "interleaved",
            "largest_error",
            "peak_memory",
            "peak_memories",
            "machine",
            "PeakMemoryUnavailable",
        ),
    }
    for module, listed in documented.items():
        for name in listed:
            thing = getattr(module, name)
            found[f"name {module.__name__}.{name}"] = (
                f"{type(thing).__name__}({signature(thing)}) {getattr(thing, '_fields', '')}"
            )
            if module is nn:
                found[f"name {module.__name__}.{name}.forward"] = signature(thing.forward)
    for op in sorted(op for op in torch._C._dispatch_get_all_op_names() if op.startswith("fastalign::")):
        found[f"op {op}"] = "there"
    return found


def helps() -> Record:
    from fastalign import cli

    found = {}
    for command in ("", *cli.COMMANDS):
        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            cli.main([command, "--help"] if command else ["--help"])
        lines = text.getvalue().splitlines()
        fields = [
            line
            for line in lines
            if line.startswith("  ")
            and not line.startswith("   ")
            and (": " in line or line.startswith("  -"))
        ]
        # The text after a flag is wording.
        found[f"help fields of {command or 'fastalign'}"] = " | ".join(
            x.strip() if ": " in x else x.split()[0] for x in fields
        )
        found[f"help text of {command or 'fastalign'}"] = hashlib.sha256(
            text.getvalue().encode()
        ).hexdigest()[:16]
    return found


def plans() -> Record:
    import torch

    import fastalign_kernels as k

    found = {}
    for n, h, v in ((1, 8, 8), (512, 576, 49152), (4096, 4096, 128256), (70000, 64, 300)):
        for dtype in (torch.float32, torch.bfloat16):
            for device in ("cpu", "cuda"):
                for hidden, weight in ((True, True), (True, False), (False, True), (False, False)):
                    for upstream in ("scalar", "logp", "table"):
                        for tail_eps in (None, 1e-3):
                            for workspace in (None, 7.0):
                                options = {
                                    "dtype": dtype,
                                    "device": device,
                                    "hidden_grad": hidden,
                                    "weight_grad": weight,
                                }
                                options |= {
                                    "upstream": upstream,
                                    "tail_eps": tail_eps,
                                    "workspace_mib": workspace,
                                }
                                try:
                                    plan: Any = tuple(k.plan_head(n, h, v, **options))
                                except ValueError:
                                    plan = "raises ValueError"
                                found[f"plan {n} {h} {v} {list(options.values())}"] = repr(plan)
    return found


def modules() -> Record:
    """fastalign.nn: the repr and one result of each."""
    import torch

    from fastalign import nn

    torch.manual_seed(0)
    hidden, weight, ids = torch.randn(4, 5, 8), torch.randn(20, 8), torch.randint(20, (4, 5))
    rows, mask = torch.randn(4), torch.ones(4, 5)
    calls = {
        "CrossEntropyLoss": ((torch.randn(4, 5, 20), ids), {"z_loss": 0.1}, {}),
        "LinearCrossEntropyLoss": ((hidden, weight, ids), {"softcap": 5.0}, {}),
        "LinearDPOLoss": ((hidden, weight, ids), {"beta": 0.2}, {"reference_logps": rows}),
        "LinearKTOLoss": (
            (hidden, weight, ids, rows > 0, torch.tensor(0.1)),
            {"beta": 0.2},
            {"reference_logps": rows},
        ),
        "LinearPPOLoss": ((hidden, weight, ids, mask - 3, mask, mask), {"entropy_coefficient": 0.01}, {}),
    }
    found = {}
    for name, (arguments, options, keywords) in calls.items():
        module = getattr(nn, name)(**options)
        result = module(*arguments, **keywords)
        found[f"nn {name}"] = (
            f"{module!r} {[digest(x) for x in (result if isinstance(result, tuple) else [result])]}"
        )
    return found


GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.2, "n_positions": 96}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


def models() -> Record:
    """A fused Hugging Face model's losses, log-probabilities and gradients, and rollouts."""
    import torch
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
    )

    from fastalign import causal_lm, classifier, rollout

    found = {}
    for name, model_type, config in (
        (
            "gpt2",
            GPT2LMHeadModel,
            GPT2Config(vocab_size=300, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, **GPT2),
        ),
        ("llama", LlamaForCausalLM, LlamaConfig(vocab_size=300, **LLAMA)),
    ):
        torch.manual_seed(1)
        model = causal_lm.fuse_head(model_type(config))
        ids = torch.randint(300, (3, 9))
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        found[f"fused {name} loss"] = digest(output.loss)
        found |= {f"fused {name} d {n}": digest(p.grad) for n, p in model.named_parameters()}
        model.eval()
        for number, options in enumerate(
            ({}, {"temperature": 0.7, "top_p": 0.9}, {"top_k": 5, "repetition_penalty": 1.3})
        ):
            prompts = torch.tensor([[0, 5, 6, 7], [9, 8, 7, 6], [0, 0, 0, 4]])
            drawn = rollout.generate(
                model,
                prompts,
                (prompts != 0).long(),
                max_new_tokens=10,
                seed=number,
                eos_id=1,
                pad_id=0,
                **options,
            )
            found |= {f"rollout {name} {number} {field}": digest(x) for field, x in zip(drawn._fields, drawn)}
        causal_lm.unfuse_head(model)
        found[f"unfused {name} logits"] = digest(model(input_ids=ids).logits)
    torch.manual_seed(2)
    scorer = LlamaForSequenceClassification(
        LlamaConfig(vocab_size=300, num_labels=1, pad_token_id=0, **LLAMA)
    )
    ids = torch.randint(1, 300, (2, 7))
    found["classifier"] = digest(scorer(input_ids=ids).logits)
    found["packed classifier"] = digest(classifier.score_packed(scorer)(input_ids=ids).logits)
    return found


# Stages


WORDS = [
    "the",
    "a",
    "film",
    "story",
    "actor",
    "is",
    "was",
    "good",
    "bad",
    "dull",
    "bright",
    "and",
    "but",
    "never",
]
CLOCK = ("seconds", "per_second", "memory")
CHECK = """
def count(prompts, completions):
    return [text.count("a") - 0.05 * len(text) for text in completions]
"""


def sentence(number: int) -> str:
    return " ".join(
        WORDS[(number * 5 + 3 * place * place) % len(WORDS)] for place in range(3 + number * 5 % 12)
    )


def stages() -> Record:
    """A few steps of each stage: metrics without times, weights."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    from fastalign import cli

    found: Record = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.chdir(folder)
        pairs = [
            {
                "prompt": sentence(n),
                "chosen": " good " + sentence(n + 50),
                "rejected": " bad " + sentence(n + 81),
            }
            for n in range(24)
        ]
        chats = [
            {
                "messages": [
                    {"role": "user", "content": sentence(n)},
                    {"role": "assistant", "content": sentence(n + 9)},
                ]
            }
            for n in range(24)
        ]
        rows = {
            "text": [{"text": sentence(n)} for n in range(40)],
            "completions": [{"prompt": sentence(n), "completion": " " + sentence(n + 50)} for n in range(24)],
            "pairs": pairs,
            "margins": [row | {"margin": n / 8} for n, row in enumerate(pairs)],
            "judged": [
                {
                    "prompt": p["prompt"],
                    "completion": p["chosen" if n % 3 else "rejected"],
                    "label": n % 3 > 0,
                }
                for n, p in enumerate(pairs)
            ],
            "prompts": [{"prompt": sentence(n)} for n in range(24)],
            "chats": chats,
        }
        for data, records in rows.items():
            Path(f"{data}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))
        Path("functions.py").write_text(CHECK)
        cli.main(["tokenizer", "train_data=text.jsonl", "output_dir=tokenizer", "vocab_size=300"])
        found["tokenizer"] = hashlib.sha256(Path("tokenizer/tokenizer.json").read_bytes()).hexdigest()[:16]
        tokenizer = AutoTokenizer.from_pretrained("tokenizer")
        torch.manual_seed(3)
        ids = {
            f"{which}_token_id": getattr(tokenizer, f"{which}_token_id") for which in ("bos", "eos", "pad")
        }
        base = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **GPT2, **ids))
        base.save_pretrained("base")
        tokenizer.save_pretrained("base")
        common = ["model=base", "max_steps=3", "device=cpu", "batch_size=8", "learning_rate=1e-3"]
        preference = [*common, "max_length=96"]
        runs = {
            "pretrain": ["train_data=text.jsonl", "eval_data=text.jsonl", "tokenizer=tokenizer", f"model_config={json.dumps({'model_type': 'llama'} | LLAMA)}",
                         "sequence_length=40", "batch_size=4", "learning_rate=1e-2", "max_steps=3", "device=cpu", "save_every=2"],
            "sft": [*preference, "train_data=completions.jsonl", "eval_data=completions.jsonl", "micro_batch_size=4"],
            "sft chats": [*preference, "train_data=chats.jsonl", "packing=true", "max_length=128", "tail_eps=1e-3", "batch_size=2"],
            "sft lora": [*preference, "train_data=completions.jsonl", "lora_rank=4", "bf16=true"],
            "reward": [*preference, "train_data=margins.jsonl", "center_coefficient=0.1"],
            "dpo": [*preference, "train_data=pairs.jsonl", "eval_data=pairs.jsonl"],
            "dpo ipo": [*preference, "train_data=pairs.jsonl", "loss_type=ipo", "packing=false", "reference=precomputed"],
            "dpo lora": [*preference, "train_data=pairs.jsonl", "lora_rank=4", "dtype=float64"],
            "kto": [*preference, "train_data=judged.jsonl", "eval_data=judged.jsonl"],
            "ppo": [*common, "train_data=prompts.jsonl", "eval_data=prompts.jsonl", "reward=functions.py:count", "max_new_tokens=12", "ppo_epochs=2", "minibatches=2", "max_steps=2"],
            "ppo shared": [*common, "train_data=prompts.jsonl", "reward=reward/model", "value=shared", "max_new_tokens=12", "ppo_epochs=1",
                           "rescore=true", "importance_cap=2", "kl_in=loss", "entropy_coef=0.01", "target_kl=1.0", "max_steps=2"],
        }  # fmt: skip
        for run_name, arguments in runs.items():
            output = run_name.replace(" ", "-")
            cli.main([run_name.split()[0], *arguments, f"output_dir={output}"])
            found |= left(run_name, Path(output))
        cli.main(
            [
                "pretrain",
                *[a if a != "max_steps=3" else "max_steps=5" for a in runs["pretrain"]],
                "resume=true",
                "output_dir=pretrain",
            ]
        )
        found |= left("pretrain resumed", Path("pretrain"))
        cli.main(["merge", "model=sft-lora/model", "output_dir=merged"])
        found |= hashes("merged", Path("merged"))
    return found


def hashes(name: str, folder: Path) -> Record:
    from safetensors.torch import load_file

    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        if "checkpoint" not in str(path):
            total = hashlib.sha256()
            tensors = load_file(path)
            for key in sorted(tensors):
                total.update(f"{key} {digest(tensors[key])}".encode())
            found[f"{name}: {path.relative_to(folder)}"] = total.hexdigest()[:16]
    return found


def left(name: str, folder: Path) -> Record:
    """What a run left: a line of metrics each, the weights, the names of its files."""
    found = hashes(name, folder)
    for number, line in enumerate((folder / "metrics.jsonl").read_text().splitlines()):
        metrics = {
            key: value for key, value in json.loads(line).items() if not any(word in key for word in CLOCK)
        }
        found[f"{name}: metrics, line {number}"] = json.dumps(metrics, sort_keys=True)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    found[f"{name}: files"] = " ".join(file for file in files if "events" not in file)
    return found


if __name__ == "__main__":
    main()
