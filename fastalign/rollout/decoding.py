"""A rollout under way: the prefill, then one token of every row a step.

A step keeps the host out: shapes and addresses are fixed, and nothing is read back from the device. So a
CUDA graph can replay it. What needs the host, the kept ids of a step, comes after it.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastalign_kernels import checks as check
from fastalign_kernels import native, sample
from fastalign_kernels.sampling import kept_rows
from fastalign_kernels.sampling_kept import KeptIds, KeptRows

from ..transformers_names import CACHE
from .screened import ScreenedHead
from .static_cache import check_written, static_cache

# Steps on the stream of the capture before it. The first compiles and loads kernels and allocates cuBLAS
# workspace. The second recompiles what torch.compile had specialised.
WARM_UP = 2
# Classes of models whose step could not be captured in this process.
_not_captured: set[str] = set()


class Decoding:
    """The state of a rollout on the device: what is drawn so far, and what the next step needs.

    `options` are `sample`'s, pad_id included. `seen`, `finished`, `positions`, `return_kept` and
    `compile_step` (compile) are `generate`'s. With `head` the backbone runs, and `head` makes its logits.
    """

    def __init__(
        self,
        model: Any,
        base: Any,
        *,
        input_ids: Tensor,
        attention_mask: Tensor,
        max_new_tokens: int,
        eos: list[int],
        options: dict[str, Any],
        head: ScreenedHead | None = None,
        return_kept: bool = False,
        seen: Tensor | None = None,
        finished: Tensor | None = None,
        positions: Tensor | None = None,
        compile_step: bool = False,
    ) -> None:
        (B, T), device = input_ids.shape, input_ids.device
        # The prefill runs once, so it is not compiled. torch finds what earlier rollouts of a model compiled.
        self.options, self.return_kept, self.head = options, return_kept, head
        model = model if head is None else head.backbone
        self.step_model = torch.compile(model) if compile_step else model
        self.accepted = inspect.signature((base if head is None else model).forward).parameters
        self.cache = static_cache(base, T + max_new_tokens - 1)  # the model never reads the last token
        self.attention = torch.cat((attention_mask, attention_mask.new_ones(B, max_new_tokens - 1)), 1)
        self.position = attention_mask.sum(1) - 1  # of the latest token in its own sequence
        # What to add to a token's position to get the position that keys its noise.
        self.noise_shift = None if positions is None else positions.long() - 1 - self.position
        self.eos = torch.tensor(eos, dtype=torch.int64, device=device)
        self.tokens = torch.empty(B, max_new_tokens, dtype=torch.int64, device=device)
        self.mask = torch.zeros(B, max_new_tokens, dtype=torch.bool, device=device)
        self.token = torch.empty(B, 1, dtype=torch.int64, device=device)
        self.column = torch.zeros(1, dtype=torch.int64, device=device)
        self.finished = (
            torch.zeros(B, dtype=torch.bool, device=device) if finished is None else finished.clone()
        )
        self.failed = torch.full((B,), -1, device=device)  # the column of a row's first failure
        self.kept_rows: KeptRows | None = None  # of the latest step, with return_kept
        self.kept_ids: list[KeptIds] = []  # of each step

        output = self.forward(model, input_ids, (attention_mask.cumsum(1) - 1).clamp(min=0))
        check_written(base, self.cache, T)
        V = output.shape[1] if head is None else head.vocab_size
        logs_dtype = torch.promote_types(output.dtype, torch.float32)
        self.logs = torch.empty(4, B, max_new_tokens, dtype=logs_dtype, device=device)
        penalty = options["repetition_penalty"]
        self.seen = (
            id_bits(input_ids, attention_mask, V) if isinstance(penalty, Tensor) or penalty != 1 else None
        )
        if seen is not None:
            check.shape("seen", seen, (B, -(-V // 32)), "[B, ceil(V / 32)]")
            check.dtype("seen", seen, (torch.int32,))
            check.device("seen", seen, "input_ids", input_ids)
            self.seen = None if self.seen is None else self.seen | seen
        self.draw(output)

    def forward(self, model: Any, ids: Tensor, positions: Tensor) -> Tensor:
        """Logits [B, V] after the last of the ids [B, t] at positions [B, t]; with `head`, hidden states."""
        optional = {"position_ids": positions, "logits_to_keep": 1}
        given = {name: value for name, value in optional.items() if name in self.accepted}
        given |= {"attention_mask": self.attention, CACHE: self.cache, "use_cache": True}
        output = model(input_ids=ids, return_dict=True, **given)
        return (output.logits if self.head is None else output.last_hidden_state)[:, -1]

    def step(self) -> None:
        self.draw(self.forward(self.step_model, self.token, self.position[:, None]))

    def draw(self, output: Tensor) -> None:
        """Draw a token of each row from what `forward` gave."""
        self.position.add_(1)
        positions = self.position if self.noise_shift is None else self.position + self.noise_shift
        options = self.options | {"positions": positions, "seen": self.seen, "finished": self.finished}
        logits = output if self.head is None else self.head.logits(output, **options)
        drawn = sample(logits, **options)
        if self.return_kept:  # before `seen` changes
            masks = {name: options[name] for name in ("repetition_penalty", "seen", "allowed")}
            self.kept_rows = kept_rows(drawn, logits, **masks)
        self.token.copy_(drawn.token[:, None])
        self.tokens.index_copy_(1, self.column, self.token)
        self.mask.index_copy_(1, self.column, ~self.finished[:, None])
        logs = torch.stack((drawn.logp, drawn.log_kept, drawn.logp_raw, drawn.entropy))
        self.logs.index_copy_(2, self.column, logs[..., None])
        self.failed.copy_(torch.where(drawn.valid | (self.failed >= 0), self.failed, self.column))
        self.finished.logical_or_((self.token == self.eos).any(1))
        if self.seen is not None:
            word = self.token >> 5
            bit = (1 << (self.token & 31)).int()
            self.seen.scatter_(1, word, self.seen.gather(1, word) | bit)
        self.column.add_(1)

    def collect_kept(self) -> None:
        """Note the kept ids of the latest step, if they are asked for. Waits for the device."""
        if self.kept_rows is not None:
            found = self.kept_rows.ids()
            self.kept_ids.append(found._replace(ids=found.ids.int()))

    def all_ended(self) -> bool:
        """Whether every row has ended. Synchronises with the device.

        Raises FloatingPointError for rows that failed.
        """
        ended, failed = torch.stack((self.finished.all(), (self.failed >= 0).any())).tolist()
        if failed:
            columns = self.failed.tolist()
            first = min(column for column in columns if column >= 0)
            rows = [row for row, column in enumerate(columns) if column == first]
            raise FloatingPointError(
                f"model: got NaN, +inf or no finite allowed logit at step {first} (from 0) in {len(rows)} "
                f"rows, {rows[:8]} first, expected finite logits"
            )
        return ended


def run_steps(step: Callable[[], None], *, capture: bool, name: str) -> Iterator[None]:
    """Take one step per item.

    With `capture`, the first steps run eagerly on a side stream. Later ones replay a CUDA graph of the same
    function. A step that cannot be captured, because its model copies from the host, say, goes on running
    eagerly. A warning says so once for each `name` of a model, and its next rollouts do not try.
    """
    if capture and name not in _not_captured:
        main = torch.cuda.current_stream()
        stream = torch.cuda.Stream()
        # Autocast's cache is off: it would keep cast weights in the graph's memory. It is off in the warm-up
        # too, because torch.compile would compile for the change, which a capture does not allow.
        cast = torch.autocast(
            "cuda",
            torch.get_autocast_dtype("cuda"),
            enabled=torch.is_autocast_enabled("cuda"),
            cache_enabled=False,
        )
        for _ in range(WARM_UP):
            stream.wait_stream(torch.cuda.current_stream())
            with cast, torch.cuda.stream(stream):
                step()
            torch.cuda.current_stream().wait_stream(stream)
            yield
        graph = torch.cuda.CUDAGraph()
        # Errors are thread-local, so that other threads (which pin batches, say) may go on calling CUDA.
        try:
            with cast, torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                step()
        except RuntimeError as error:
            torch.cuda.set_stream(main)  # a capture that CUDA ended leaves its own stream current
            _not_captured.add(name)
            reason = (str(error).splitlines() or [""])[0]
            warnings.warn(
                f"model: the decode step of {name} cannot be captured in a CUDA graph, so every step runs "
                f"eagerly ({reason})",
                stacklevel=4,
            )
        else:
            step = graph.replay
    while True:
        step()
        yield


def can_capture(base: Any, logs: Tensor) -> bool:
    """Whether a step needs no host.

    That takes the native sampler without FASTALIGN_CHECK, and a model that transformers declares fit for
    one graph.
    """
    native_sampler = (
        logs.is_cuda
        and logs.dtype == torch.float32
        and "cuda" in native.samples_on
        and not check.everywhere()
    )
    ropes = " ".join(str(getattr(module, "rope_type", "")) for module in base.modules())
    return (
        native_sampler and base._can_compile_fullgraph and "dynamic" not in ropes and "longrope" not in ropes
    )


def id_bits(ids: Tensor, mask: Tensor, V: int) -> Tensor:
    """The ids of each row where mask is set, as int32 words [B, ceil(V / 32)].

    The ids are sorted, so that an id that occurs twice adds its bit once.
    """
    ids = ids.long().masked_fill(mask == 0, -1).sort(1).values
    new = (ids >= 0) & (ids != torch.nn.functional.pad(ids, (1, 0), value=-1)[:, :-1])
    words = torch.zeros(len(ids), -(-V // 32), dtype=torch.int64, device=ids.device)
    return words.scatter_add_(1, ids.clamp(min=0) >> 5, torch.where(new, 1 << (ids & 31), 0)).int()
