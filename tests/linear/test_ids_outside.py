"""Ids outside [0, V), which nobody checks on CUDA without check=True: a negative one is ignored, a large one
makes its token's logp NaN, and the other tokens stay as they are. In Triton's interpreter, or on a GPU."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed", exc_type=ImportError)

from fastalign_kernels.linear.gpu.epilogue import EpilogueStatistics, Tiles  # noqa: E402
from fastalign_kernels.linear.gpu.epilogue_slices import EpilogueSlices  # noqa: E402
from fastalign_kernels.linear.gpu.kept_softmax import KeptSoftmax  # noqa: E402
from fastalign_kernels.linear.gpu.tail import TailEpilogue  # noqa: E402
from fastalign_kernels.linear.gpu.vocab_slices import VocabSlices  # noqa: E402
from fastalign_kernels.linear.inputs import HeadInputs, NeedsGrad  # noqa: E402
from fastalign_kernels.linear.options import HeadOptions  # noqa: E402
from fastalign_kernels.linear.token_losses import TokenCrossEntropy  # noqa: E402
from fastalign_kernels.softmax.rows import Stat  # noqa: E402
from tests.linear.epilogue_cases import DTYPE, TILES  # noqa: E402
from tests.linear.gpu_tiles import MARKS  # noqa: E402

pytestmark = MARKS

N, H, V = 24, 40, 123
LARGE = (V, V + 2, 2 * V, 2**31 + 5, 2**32 + 5)  # V + 2 lies in the last tile's padding
NEGATIVE = (-1, -5, 5 - 2**32)
ENGINES = {
    "kept_softmax": lambda: KeptSoftmax(1.0),
    "vocab_slices": lambda: VocabSlices(N * (6 * 48 + 2 * H) / 2**20),
    "epilogue": lambda: EpilogueStatistics(tiles=TILES),
    "epilogue_slices": lambda: EpilogueSlices(tiles=TILES),
    "tail": lambda: TailEpilogue(64.0, tiles=Tiles() if torch.cuda.is_available() else TILES),
}


@pytest.mark.parametrize("name", ENGINES)
def test_an_id_of_v_or_more_has_nan_as_logp_and_a_negative_one_is_ignored(device, name):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator).to(device, DTYPE)
    weight = torch.randn(V, H, generator=generator).to(device, DTYPE)
    ids = torch.randint(V, (N,), generator=generator)
    ignored = ids.clone()
    ignored[: len(LARGE) + len(NEGATIVE)] = -1
    ids[: len(LARGE) + len(NEGATIVE)] = torch.tensor([*LARGE, *NEGATIVE])
    needs = NeedsGrad(hidden=True, weight=True)
    options = HeadOptions(tail_eps=2.0**-5 if name == "tail" else None)
    loss = TokenCrossEntropy(torch.ones(N, device=device), 0.0, 0.0, V)

    def stats_of(ids):
        inputs = HeadInputs(hidden, weight, ids.to(device), None, options)
        return ENGINES[name]().statistics_and_gradients(inputs, loss, needs)[0]

    stats, expected = stats_of(ids), stats_of(ignored)
    large = range(len(LARGE))
    assert stats[Stat.LOGP, large].isnan().all()
    assert not stats[:, len(LARGE) : len(LARGE) + len(NEGATIVE)].any()
    rest = slice(len(LARGE), None)
    torch.testing.assert_close(stats[:, rest], expected[:, rest], rtol=1e-6, atol=1e-6)
