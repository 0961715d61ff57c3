"""48 faults of one line each; for each, the tests that must fail.

    make mutations                      all of them, in 6 minutes
    python .ci/mutations.py 3 17        these two
    python .ci/mutations.py --check     whether each line is still there, in a second

A fault is put into a copy of the tree in a temporary folder, and its tests run there. The exit status is 1 if
a fault is missed. It is 2, and nothing runs, if a line does not occur exactly once in its file. csrc/ is left
out: each fault there would need a build. Run `make test` first: a test that fails anyway catches everything.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
KERNELS = "kernels/fastalign_kernels/"


class Mutation(NamedTuple):
    file: str
    before: str
    after: str
    tests: str  # arguments of pytest


MUTATIONS = [
    # fastalign_kernels in PyTorch
    Mutation(
        KERNELS + "logits_ops.py",
        "loss = (1 - label_smoothing) * loss - label_smoothing *",
        "loss = loss - label_smoothing *",
        "tests/kernels/test_logits.py",
    ),
    Mutation(
        KERNELS + "logits_ops.py",
        "table[Stat.LSE] ** 2 if z_loss",
        "table[Stat.LSE] if z_loss",
        "tests/kernels/test_logits.py",
    ),
    Mutation(
        KERNELS + "logits.py",
        "torch.where(flat == ignore_index, -1, flat)",
        "torch.where(flat == -100, -1, flat)",
        "tests/kernels/test_logits.py",
    ),
    Mutation(
        KERNELS + "logits.py",
        "(ordered_sum(weights) if num_items is None",
        "(kept.sum() if num_items is None",
        "tests/kernels/test_logits.py",
    ),
    Mutation(
        KERNELS + "softmax/rows.py",
        "prob = lse - logp - mean_logp - entropy * stats[Stat.ENTROPY]",
        "prob = lse - logp - mean_logp - entropy",
        "tests/softmax/test_rows.py tests/kernels/test_logits.py",
    ),
    Mutation(
        KERNELS + "softmax/rows.py",
        "-entropy, mean_logp / vocab_size])",
        "-entropy, mean_logp])",
        "tests/kernels/test_logits.py",
    ),
    Mutation(
        KERNELS + "softmax/rows.py",
        "grad[Stat.LOGP] = (loss.label_smoothing - 1) * loss.scale",
        "grad[Stat.LOGP] = -loss.scale",
        "tests/linear/test_head.py tests/linear/test_engine.py",
    ),
    Mutation(
        KERNELS + "softmax/rows.py",
        "grad[Stat.LSE] = 2 * loss.z_loss * stats[Stat.LSE] * loss.scale",
        "grad[Stat.LSE] = loss.z_loss * stats[Stat.LSE] * loss.scale",
        "tests/linear/test_head.py tests/linear/test_engine.py",
    ),
    Mutation(
        KERNELS + "linear/cross_entropy.py",
        "filled_scale()), stats, *grads, d_scale",
        "filled_scale()), stats, *grads, token_loss(stats, 0.0, z_loss)",
        "tests/linear/test_head.py -k token_weights",
    ),
    Mutation(
        KERNELS + "linear/product_grads.py",
        "mm(grad.t(), states, self.d_weight, add=not self.weight_is_empty)",
        "mm(grad.t(), states, self.d_weight, add=False)",
        "tests/linear/test_head.py tests/linear/test_engine.py",
    ),
    Mutation(
        KERNELS + "linear/accumulate.py",
        "self.d_bias += shape * dropped.sum() + uniform.sum()",
        "self.d_bias += shape * dropped.sum()",
        "tests/linear/test_tail.py tests/linear/test_tail_calls.py",
    ),
    Mutation(
        KERNELS + "linear/accumulate.py",
        "shape = kept.dropped_sums / torch.where(total == 0, 1.0, total)",
        "shape = kept.dropped_sums / total",
        "tests/linear/test_tail.py tests/linear/test_tail_calls.py",
    ),
    Mutation(
        KERNELS + "linear/accumulate.py",
        "states_dtype=product.states.dtype if number else hidden_grad_dtype(inputs),",
        "states_dtype=product.states.dtype,",
        "tests/linear/test_gpu_engines.py -k wide",
    ),
    Mutation(
        KERNELS + "linear/plan.py",
        "gemms = 2 + gradients if way",
        "gemms = 1 + gradients if way",
        "tests/linear/test_head.py tests/linear/test_engine.py",
    ),
    Mutation(
        KERNELS + "ordered_sum.py",
        "flat[whole:].sum().view(1)",
        "flat[:0].sum().view(1)",
        "tests/kernels/test_determinism.py -k ordered",
    ),
    Mutation(
        KERNELS + "gemm.py",
        "right, right_rows = right.index_select(0, right_rows), None",
        "right, right_rows = right[: len(right_rows)], None",
        "tests/kernels/test_gemm.py",
    ),
    Mutation(
        KERNELS + "policy/weights.py",
        "counts = mask.sum(1, keepdim=True)",
        "counts = mask.sum(1, keepdim=True).clamp(max=3)",
        "tests/policy",
    ),
    Mutation(
        KERNELS + "sampling.py",
        "above = sorted_mass.cumsum(-1) - sorted_mass",
        "above = sorted_mass.cumsum(-1)",
        "tests/kernels/test_sampling.py",
    ),
    # screened logits on a GPU
    Mutation(
        KERNELS + "linear/gpu/screen_exact_triton.py",
        "total = (tl.sum(mass, 0) + rest_mass) * tl.exp(from_lse8)",
        "total = tl.sum(mass, 0) * tl.exp(from_lse8)",
        "tests/linear/test_screen_gpu.py",
    ),
    Mutation(
        KERNELS + "linear/gpu/tail_triton.py",
        "sure |= p >= tl.exp2(-logsum - margin)[:, None]",
        "sure |= p > 2.0",
        "tests/linear/test_screen_gpu.py",
    ),
    Mutation(
        KERNELS + "linear/gpu/screen.py",
        "if unfit()[0] or used >",
        "if used >",
        "tests/linear/test_screen_gpu.py",
    ),
    # fastalign_kernels in Triton
    Mutation(
        KERNELS + "policy/losses_triton.py",
        "high = (minus_a < 0) & (r > upper)",
        "high = (minus_a < 0) & (r >= lower)",
        "tests/policy",
    ),
    Mutation(
        KERNELS + "policy/losses_triton.py",
        "grad += kl_coefficient * e",
        "grad += 0.5 * kl_coefficient * e",
        "tests/policy",
    ),
    Mutation(
        KERNELS + "policy/losses_triton.py",
        "clipped = held * held > plain * plain",
        "clipped = held * held < plain * plain",
        "tests/policy",
    ),
    Mutation(
        KERNELS + "preference/losses_triton.py",
        "tl.store(grads + i, d_c - nll_weight / n_c, mask=inside)",
        "tl.store(grads + i, d_c, mask=inside)",
        "tests/preference",
    ),
    Mutation(
        KERNELS + "preference/losses_triton.py",
        "FORMULA(c - offset, r, beta",
        "FORMULA(c, r, beta",
        "tests/preference",
    ),
    Mutation(
        KERNELS + "softmax/row_passes_triton.py",
        "tl.store(stats + LSE * N + row, row_max + logsum)",
        "tl.store(stats + LSE * N + row, logsum)",
        "tests/softmax/test_rows.py",
    ),
    Mutation(
        KERNELS + "softmax/row_passes_triton.py",
        "return _exp(shifted) * prob + uniform",
        "return _exp(shifted) * prob",
        "tests/kernels/test_loss_in_forward.py",
    ),
    Mutation(
        KERNELS + "softmax/row_passes_triton.py",
        "tl.where(onehot != 0, target_logp + logsum, shifted)",
        "tl.where(onehot != 0, shifted, shifted)",
        "tests/softmax/test_recomputed_logits.py",
    ),
    Mutation(
        KERNELS + "policy/advantages_triton.py",
        "r + gamma * next_value - v, 0.0)",
        "r + decay * next_value - v, 0.0)",
        "tests/policy/test_advantage.py",
    ),
    Mutation(
        KERNELS + "preference/formulas.py",
        "m = c - 0.5 / beta",
        "m = c + 0.5 / beta",
        "tests/preference",
    ),
    # data and rollouts
    Mutation(
        "fastalign/data/packing.py",
        "token if train and position else IGNORE_INDEX",
        "token if train else IGNORE_INDEX",
        "tests/data/test_tokenization.py tests/data/test_packing.py",
    ),
    Mutation(
        "fastalign/data/packing.py",
        "place = bisect_left(room, lengths[index])",
        "place = bisect_left(room, lengths[index] + 1)",
        "tests/data/test_tokenization.py tests/data/test_packing.py",
    ),
    Mutation(
        "fastalign/data/packing.py",
        "lengths += [width - sum(lengths)] if width > sum(lengths) else []",
        "lengths += []",
        "tests/data/test_tokenization.py tests/data/test_packing.py",
    ),
    Mutation(
        "fastalign/data/tokenization.py",
        "Tokenized(ids[:max_length], trained[:max_length])",
        "Tokenized(ids[: max_length + 1], trained[: max_length + 1])",
        "tests/data/test_tokenization.py tests/data/test_packing.py",
    ),
    Mutation(
        "fastalign/rollout/decoding.py",
        "self.mask.index_copy_(1, self.column, ~self.finished[:, None])",
        "self.mask.index_copy_(1, self.column, torch.ones_like(self.finished[:, None]))",
        "tests/rollout",
    ),
    Mutation(
        "fastalign/rollout/decoding.py",
        "self.position = attention_mask.sum(1) - 1  # of",
        "self.position = attention_mask.sum(1)  # of",
        "tests/rollout",
    ),
    Mutation("fastalign/rollout/decoding.py", "self.seen.gather(1, word) | bit)", "bit)", "tests/rollout"),
    # stages
    Mutation(
        "fastalign/stages/optimization.py",
        'group["lr"] = peak * fraction',
        'group["lr"] = peak',
        "tests/stages/test_schedules.py -k learning_rate",
    ),
    Mutation(
        "fastalign/stages/optimization.py",
        "config.weight_decay if decays else 0.0",
        "config.weight_decay",
        "tests/stages/test_training.py -k decay",
    ),
    Mutation(
        "fastalign/stages/loop.py",
        "torch.manual_seed(config.seed + world.dp_rank)",
        "torch.manual_seed(0)",
        "tests/stages/test_schedules.py -k learning_rate",
    ),
    Mutation(
        "fastalign/stages/dpo.py",
        "[chosen, rejected, *reference_logps],",
        "[chosen, rejected, *reversed(reference_logps)],",
        "tests/stages/preference",
    ),
    Mutation(
        "fastalign/stages/kto.py",
        'references.append(logps[: len(batch["desirable"])])',
        'references.append(logps[-len(batch["desirable"]) :])',
        "tests/stages/preference",
    ),
    Mutation(
        "fastalign/stages/ppo_experience.py",
        "kl_reward.scatter_add(1, mask.sum(1, keepdim=True) - 1,",
        "kl_reward.scatter_add(1, mask.sum(1, keepdim=True) * 0,",
        "tests/stages/ppo",
    ),
    Mutation(
        "fastalign/stages/rollouts.py",
        '- options.missing_eos_penalty * ~gathered["ended"]',
        '- options.missing_eos_penalty * gathered["ended"]',
        "tests/stages/ppo",
    ),
    Mutation(
        "fastalign/stages/grpo.py",
        "groups - groups.mean(1, keepdim=True)",
        "groups - groups.mean()",
        "tests/stages/ppo/test_grpo.py -k advantages",
    ),
    Mutation(
        "fastalign/stages/grpo.py",
        "learnt=drawn.mask & whole[:, None]",
        "learnt=drawn.mask",
        "tests/stages/ppo/test_grpo.py -k truncated",
    ),
    Mutation(
        "fastalign/stages/rollouts.py",
        "sorted(range(len(kept)), key=lambda number: spans[number])",
        "range(len(kept))",
        "tests/stages/ppo/test_behaviour.py -k packed_kept",
    ),
]


def copy_tree(folder: Path) -> None:
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in [*filter(None, names), KERNELS + "_native.so"]:
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def run_tests(folder: Path, tests: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder), str(folder / "kernels")])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "--no-header",
        "-p",
        "no:cacheprovider",
        *tests.split(),
    ]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def find_stale(number: int, mutation: Mutation) -> list[str]:
    """Why a mutation no longer fits the tree: its file, its line or its tests are gone."""
    at, path = f"mutation {number}, {mutation.file}", ROOT / mutation.file
    if not path.exists():
        return [f"{at}: no such file"]
    found = path.read_text(encoding="utf-8").count(mutation.before)
    stale = [] if found == 1 else [f"{at}: got {found} times, expected once: {mutation.before}"]
    tests = [word for word in mutation.tests.split() if word.startswith("tests/")]
    return stale + [f"{at}: no test {test}" for test in tests if not (ROOT / test).exists()]


def try_mutation(folder: Path, mutation: Mutation) -> str:
    """caught, or why not."""
    path = folder / mutation.file
    source = path.read_text(encoding="utf-8")
    path.write_text(source.replace(mutation.before, mutation.after), encoding="utf-8")
    try:
        run = run_tests(folder, mutation.tests)
    finally:
        path.write_text(source, encoding="utf-8")
    if run.returncode == 1:  # tests ran and failed
        failed = next((line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))), "")
        return f"caught by {failed.split(' - ')[0].removeprefix('FAILED ')}"
    if run.returncode == 0:
        return "MISSED"
    return f"MISSED: pytest ended with status {run.returncode}: {run.stdout[-300:]}"


def main() -> int:
    words = sys.argv[1:]
    numbers = [int(word) for word in words if word != "--check"] or list(range(1, len(MUTATIONS) + 1))
    stale = [line for number in numbers for line in find_stale(number, MUTATIONS[number - 1])]
    for line in stale:
        print(f"STALE {line}")
    if stale:
        print(f"{len(stale)} lines of .ci/mutations.py do not fit the tree: nothing was run", flush=True)
        return 2
    if "--check" in words:
        print(f"all {len(numbers)} mutations fit the tree")
        return 0
    missed = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copy_tree(folder)
        for number in numbers:
            mutation = MUTATIONS[number - 1]
            began = time.perf_counter()
            verdict = try_mutation(folder, mutation)
            missed += verdict.startswith("MISSED")
            print(f"{number:2} {mutation.file}: {mutation.after}")
            print(f"   {verdict} ({time.perf_counter() - began:.0f} s)", flush=True)
    print(f"{len(numbers) - missed} of {len(numbers)} faults caught")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
