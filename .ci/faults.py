"""The faults that .ci/mutations.py puts into the code, and the tests that must fail for each."""

from typing import NamedTuple

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
        "kl_grad = kl_coefficient * e",
        "kl_grad = 0.5 * kl_coefficient * e",
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
        "fastalign/stages/policy/ppo_experience.py",
        "kl_reward.scatter_add(1, mask.sum(1, keepdim=True) - 1,",
        "kl_reward.scatter_add(1, mask.sum(1, keepdim=True) * 0,",
        "tests/stages/ppo",
    ),
    Mutation(
        "fastalign/stages/policy/rollouts.py",
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
        "fastalign/stages/policy/rollouts.py",
        "sorted(range(len(kept)), key=lambda number: spans[number])",
        "range(len(kept))",
        "tests/stages/ppo/test_behaviour.py -k packed_kept",
    ),
]
