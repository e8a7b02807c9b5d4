"""INQ: powers of two and zero; weights are quantized and frozen in groups, the largest first, while the rest retrain.

Zhou et al., "Incremental Network Quantization: Toward Lossless CNNs with Low-Precision Weights", ICLR 2017,
arXiv 1702.03044: value set equations 1 to 3, rounding equation 4, partition by magnitude section 2.2.
"""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from lowbit.errors import LowbitError
from lowbit.quantizers.base import Method, WeightQuantizer, as_float, method

__all__ = ["INQ", "inq", "inq_codes", "inq_exponent", "inq_levels", "inq_partition"]

SHARES = (0.5, 0.75, 0.875, 1.0)  # fractions of a layer's weights that are frozen in each quarter of the training
FREE, UNSCHEDULED = -1, -2  # placeholders for the code of a weight that has none yet


def inq_levels(bits: int) -> Tensor:
    """The value set over 2^n1, {0, ±2^-k : k = 0 ... 2^(bits-2)-1}, float32, ascending; 2^(bits-1)+1 values."""
    if not (isinstance(bits, int) and 2 <= bits <= 5):
        raise LowbitError(f"bits={bits!r} is not allowed: INQ takes 2 to 5 bits")
    positive = 2.0 ** -torch.arange(2 ** (bits - 2) - 1, -1, -1, dtype=torch.float32)
    return torch.cat([-positive.flip(0), torch.zeros(1), positive])


def inq_exponent(w: Tensor) -> Tensor:
    """n1 = ⌊log2(4/3·max|w|)⌋ over the whole of ``w``, int32, no dims: the largest weight rounds to 2^n1."""
    largest = as_float(w.detach()).abs().amax()
    mantissa, exponent = torch.frexp(largest.clamp_min(torch.finfo(largest.dtype).tiny))  # mantissa in [½, 1)
    # int32: NCCL, with which DDP broadcasts buffers, has no int16.
    return (exponent - (mantissa < 0.75).int()).to(torch.int32)


def _codes(w: Tensor, bits: int, n1: Tensor) -> Tensor:
    levels = inq_levels(bits).to(w)
    positive = levels[len(levels) // 2 :]
    # right=True: equation 4 gives a weight half-way between two magnitudes the larger.
    index = torch.bucketize(
        (w.abs() / torch.exp2(n1.to(w))).contiguous(), (positive[1:] + positive[:-1]) / 2, right=True
    )
    return (len(levels) // 2 + torch.where(w < 0, -index, index)).to(torch.int16)


def _values(codes: Tensor, bits: int, scale: Tensor) -> Tensor:
    return scale * inq_levels(bits).to(scale)[codes.long()]


class _INQ(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, bits: int, n1: Tensor) -> Tensor:
        value = _values(_codes(w, bits, n1), bits, torch.exp2(n1.to(w)))
        return torch.where(w.isnan(), w, value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


def inq(w: Tensor, bits: int, n1: Tensor | None = None) -> Tensor:
    """Fake-quantize ``w`` to {0, ±2^n2 ... ±2^n1}, n2 = n1+1-2^(bits-2), at once; the gradient is the identity.

    A weight is rounded to the nearest level, ties to the larger magnitude, and clipped at ±2^n1 (equation 4).

    Args:
        w: float, any shape; one layer.
        bits: 2 to 5; at 2 the set is {0, ±2^n1}.
        n1: the largest exponent, an int tensor without dims; None takes `inq_exponent` of ``w``.

    Returns:
        A tensor like ``w``.

    Raises:
        LowbitError: ``bits`` out of range.
    """
    return _INQ.apply(as_float(w), bits, inq_exponent(w) if n1 is None else n1).to(w.dtype)  # cast outside, see statsq


def inq_codes(w: Tensor, bits: int, n1: Tensor | None = None) -> Tensor:
    """Indices into `inq_levels`, int16."""
    with torch.no_grad():
        return _codes(as_float(w), bits, inq_exponent(w) if n1 is None else n1)


def inq_partition(w: Tensor, share: float, frozen: Tensor | None = None) -> Tensor:
    """Mask that freezes ``share`` of the weights: those in ``frozen``, then the largest of the rest.

    Args:
        w: float, any shape; one layer.
        share: fraction of all weights, 0 to 1; their number is rounded to an integer.
        frozen: weights that are frozen already, bool like ``w``; None for none. They stay frozen, even if they exceed
            ``share``.

    Returns:
        Bool like ``w``. Ties go to the first of equally large weights.
    """
    frozen = torch.zeros_like(w, dtype=torch.bool) if frozen is None else frozen
    size = torch.where(frozen, torch.inf, as_float(w.detach()).abs()).flatten()
    first = size.argsort(descending=True, stable=True)[: round(share * w.numel())]
    return frozen.flatten().index_fill(0, first, True).view_as(frozen)


@method("inq")
class INQ(Method):
    """Incremental network quantization; starts from a trained full-precision model, one scale 2^n1 for each layer.

    `lowbit.train` freezes 50, 75, 87.5 and 100 % of each layer's weights at the start of the four quarters of the
    training, always the largest of the remaining ones. Frozen weights keep their level and never move again; the others
    train in full precision. So the layer is not on the grid until the last quarter, in which only the rest of the model
    (biases, normalization, first and last layers) still trains. The paper restarts its learning rate at each stage;
    here one run has one schedule.

    Outside `lowbit.train` nothing is frozen: every forward pass rounds all weights, with the identity as gradient. This
    is post-training quantization, or straight-through training on INQ's grid. Assigning a weight to a layer returns the
    layer to this state, with a new scale.

    Args:
        bits: 2 to 5. As published, one bit is reserved for zero, so 2^(bits-1)+1 of the 2^bits codes are used.
    """

    bits: Annotated[int, Field(ge=2, le=5)] = 4

    def weight(self, weight: Tensor) -> WeightQuantizer:
        """See `Method.weight`."""
        return INQWeight(self, weight)


class INQWeight(WeightQuantizer):
    """`inq` as a parametrization with one latent, the full-precision weight, and a record of the frozen weights.

    Attributes:
        n1: exponent of the largest level, int32, without dims; set at conversion.
        held: int8, of the weight's shape: the code of a frozen weight, `FREE` for one that still trains in full
            precision, `UNSCHEDULED` for all before the first step. Both are buffers and part of the state dict.
    """

    n1: Tensor
    held: Tensor

    def __init__(self, config: INQ, weight: Tensor):
        super().__init__()
        self.config = config
        self.register_buffer("n1", inq_exponent(weight))
        self.register_buffer("held", torch.full_like(weight, UNSCHEDULED, dtype=torch.int8))
        self._stage: int | None = None  # the stage up to which `held` is frozen; reading `held` would stall a GPU
        self.register_load_state_dict_post_hook(_forget_stage)

    def forward(self, latent: Tensor) -> Tensor:
        trained = torch.where(self.held == FREE, latent, inq(latent, self.config.bits, self.n1))
        return torch.where(self.held >= 0, self._frozen_values(latent), trained)

    def _frozen_values(self, latent: Tensor) -> Tensor:
        return _values(self.held.clamp_min(0), self.config.bits, self.scale(latent)).to(latent.dtype)

    @property
    def levels(self) -> Tensor:
        return inq_levels(self.config.bits)

    def codes(self, latent: Tensor) -> Tensor:
        return torch.where(self.held >= 0, self.held.short(), inq_codes(latent, self.config.bits, self.n1))

    def scale(self, latent: Tensor) -> Tensor:
        return torch.exp2(self.n1.to(as_float(latent.detach()))).reshape((1,) * latent.ndim)

    def right_inverse(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            self.n1.copy_(inq_exponent(weight))
            self.held.fill_(UNSCHEDULED)
        self._stage = None
        return weight

    def before_step_(self, progress: float, latent: Tensor) -> None:
        stage = min(int(progress * len(SHARES)), len(SHARES) - 1)
        with torch.no_grad():
            if stage != self._stage:
                frozen = inq_partition(latent, SHARES[stage], self.held >= 0)
                self.held.copy_(torch.where(frozen, self.codes(latent), FREE))
                self._stage = stage
            # Momentum and weight decay have moved the frozen latents too: put them back.
            latent.copy_(torch.where(self.held >= 0, self._frozen_values(latent), latent))


def _forget_stage(module: nn.Module, _keys: object) -> None:
    assert isinstance(module, INQWeight)
    module._stage = None
