"""The functions of each host that an integration replaces or calls: module, name and parameters.

They were read in the release or at the commit that `source` names. `patch()` compares them with the installed
host. The tests compare them too if the host is installed; if not, they build a stand-in from them.
"""

from typing import NamedTuple


class Function(NamedTuple):
    """A function of a host."""

    module: str
    name: str  # dotted inside the module
    parameters: tuple[str, ...]


class Published(NamedTuple):
    """What a release or a commit of a host has."""

    host: str  # the distribution
    tested: tuple[str, ...]  # its releases
    source: str
    functions: tuple[Function, ...]


VERL = Published(
    "verl",
    ("0.9",),
    "verl-0.9.1-py3-none-any.whl, sha256 db6e6f2a8d9d5808d9ec32d357a42319fdc6967df688ff9d9810050f49bfdd14; "
    "verl/models/transformers/fused_lm_head.py of commit 5a00c1c calls the same two functions",
    (
        Function(
            "verl.utils.kernel.linear_cross_entropy",
            "LinearCrossEntropy.forward",
            ("ctx", "hidden", "weight", "labels", "temperature", "reduction", "dist_process_group"),
        ),
        Function(
            "verl.utils.experimental.torch_functional",
            "FusedLinearForPPO.forward",
            ("self", "hidden_states", "vocab_weights", "input_ids", "temperature"),
        ),
        Function("verl.workers.engine.base", "BaseEngine.train_batch", ("self", "data", "loss_function")),
        Function("verl.workers.engine.base", "BaseEngine.infer_batch", ("self", "data", "loss_function")),
    ),
)

VERL_POLICY_LOSS = Published(
    VERL.host,
    ("0.9.0", "0.9.1"),  # the parameters do not tell what a loss computes
    VERL.source,
    (
        Function(
            "verl.trainer.ppo.core_algos",
            "compute_policy_loss_vanilla",
            (
                "old_log_prob",
                "log_prob",
                "advantages",
                "response_mask",
                "loss_agg_mode",
                "config",
                "rollout_is_weights",
            ),
        ),
        Function(
            "verl.trainer.ppo.core_algos",
            "agg_loss",
            (
                "loss_mat",
                "loss_mask",
                "loss_agg_mode",
                "dp_size",
                "batch_num_tokens",
                "global_batch_size",
                "loss_scale_factor",
            ),
        ),
    ),
)

# Actor.forward of 0.11.0 has the same parameters, but its entropy is that of temperature 1.
OPENRLHF = Published(
    "openrlhf",
    ("0.11.1", "0.11.2"),
    "openrlhf-0.11.2-cp311-cp311-manylinux1_x86_64.whl, "
    "sha256 c969d70db03a70724c3d8a5a01186c6e0728bce624fb3dff95e39b5396acefa6; 0.11.1 has the same actor.py",
    (
        Function(
            "openrlhf.models.actor",
            "Actor.forward",
            (
                "self",
                "sequences",
                "action_mask",
                "attention_mask",
                "return_output",
                "allgather_logits",
                "return_logprobs",
                "ring_attn_group",
                "packed_seq_lens",
                "return_entropy",
                "mm_inputs",
            ),
        ),
        Function("openrlhf.models.actor", "log_probs_from_logits", ("logits", "labels", "temperature")),
        Function("openrlhf.models.actor", "compute_entropy", ("logits",)),
        Function(
            "openrlhf.models.actor",
            "unpad_and_slice_tensor",
            ("sequences", "attention_mask", "ring_attn_group"),
        ),
        Function(
            "openrlhf.utils.deepspeed.deepspeed",
            "DeepspeedStrategy.optimizer_step",
            ("self", "_optimizer", "model", "_scheduler", "name", "kwargs"),
        ),
    ),
)

_LLAMAFACTORY_FIT = Function("llamafactory.v1.core.base_trainer", "BaseTrainer.fit", ("self",))

LLAMAFACTORY = Published(
    "llamafactory",
    ("0.9.6.dev0", "0.9.5"),
    "llamafactory-0.9.5-py3-none-any.whl, "
    "sha256 10776e9b259798bf65f6c5343f6298f0302e92e9cd47472abe29eef69e286c6a",
    (
        Function(
            "llamafactory.v1.core.base_trainer",
            "BaseTrainer.compute_log_probs",
            ("self", "model", "batch"),
        ),
        _LLAMAFACTORY_FIT,
    ),
)

LLAMAFACTORY_CHUNK_LOSS = Published(
    LLAMAFACTORY.host,
    LLAMAFACTORY.tested,
    "commits b750af1 and 234c75a, in no release yet",
    (
        Function(
            "llamafactory.v1.plugins.model_plugins.chunk_loss.interceptor",
            "chunked_linear_cross_entropy",
            (
                "hidden_states",
                "head_weight",
                "head_bias",
                "labels",
                "loss_weights",
                "chunk_size",
                "denominator",
            ),
        ),
        Function(
            "llamafactory.v1.plugins.model_plugins.chunk_loss.interceptor",
            "chunked_linear_log_probs",
            ("hidden_states", "head_weight", "head_bias", "labels", "chunk_size"),
        ),
        _LLAMAFACTORY_FIT,
    ),
)
