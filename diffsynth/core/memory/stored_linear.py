"""A linear layer whose weight is kept in fewer bits than it is computed in; how is described in `storage.py`."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST_SCALE = 1e-12  # of a channel that is zero throughout
FP8_MAX, INT8_MAX = 448, 127
ROWS = 256  # encoded at once: what lies between takes several times their memory
NF4_BLOCK = 64  # weights that share a scale


@dataclass(frozen=True)
class Scaled:
    """Numbers of 8 bits, each output channel (row) scaled so that its largest weight becomes `largest`."""

    dtype: torch.dtype
    largest: int

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        parts = [self._encode(rows) for rows in weight.split(len(weight) if weight.is_meta else ROWS)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _encode(self, weight: Tensor) -> dict[str, Tensor]:
        peak = torch.linalg.vector_norm(weight, torch.inf, dim=1, keepdim=True, dtype=torch.float32)
        scale = peak.clamp_(min=SMALLEST_SCALE) / self.largest
        numbers = weight / scale
        numbers = numbers if self.dtype.is_floating_point else numbers.round_()
        return {"bits": numbers.to(self.dtype).view(torch.uint8), "scale": scale.view(torch.int32)}

    def decode(self, layer: "StoredLinear", dtype: torch.dtype) -> Tensor:
        return layer.bits.view(self.dtype).to(dtype).mul_(layer.scale.view(torch.float32))


class Cast:
    """Numbers of 8 bits without any scale."""

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        # Beyond the largest the cast makes NaN.
        return {"bits": weight.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)}

    def decode(self, layer: "StoredLinear", dtype: torch.dtype) -> Tensor:
        return layer.bits.view(torch.float8_e4m3fn).to(dtype)


class NormalFloat:
    """Numbers of 4 bits, by bitsandbytes."""

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        from bitsandbytes.functional import quantize_4bit

        bits, state = quantize_4bit(weight, blocksize=NF4_BLOCK, quant_type="nf4")
        return {"bits": bits, "scale": state.absmax.view(torch.int32)}

    def decode(self, layer: "StoredLinear", dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        shape = torch.Size((layer.out_features, layer.in_features))
        scale = layer.scale.view(torch.float32)
        return dequantize_4bit(layer.bits, QuantState(scale, shape, blocksize=NF4_BLOCK, quant_type="nf4", dtype=dtype))


METHODS = {
    "fp8": Scaled(torch.float8_e4m3fn, FP8_MAX),
    "fp8_cast": Cast(),
    "int8": Scaled(torch.int8, INT8_MAX),
    "nf4": NormalFloat(),
}


class StoredLinear(nn.Linear):
    """A frozen linear layer that decodes its weight for each product, in the dtype of the product.

    What it keeps are integers, which are the bits of other numbers: casts of the model leave them as they are, every
    collective carries them, and no library takes their dtype for the model's.

    Args:
        linear: The layer it stands for; one on the meta device gets its weight by `encode`.
        storage: Key of METHODS.
        dtype: What `weight` is decoded to; None is that of the layer.
    """

    def __init__(self, linear: nn.Linear, storage: str, dtype: torch.dtype | None = None):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.storage, self.dtype = storage, dtype or linear.weight.dtype
        self.register_parameter("bias", linear.bias)
        for name, tensor in self.encode(linear.weight.detach()).items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    @property
    def weight(self) -> Tensor:
        """A decoded copy (out, in); what is written into it is lost."""
        return self.decode(self.dtype)

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """What to keep of a weight (out, in), by the name of the parameter."""
        return METHODS[self.storage].encode(weight)

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in)."""
        return METHODS[self.storage].decode(self, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self)

    def _apply(self, fn, recurse=True):
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.bits.device)).dtype  # as a plain weight's
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, storage={self.storage}"


class _Product(torch.autograd.Function):
    """x Wᵀ + b, of which nothing is saved but where W is kept: the backward pass decodes it again."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: StoredLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.decode(_dtype_of_product(x)), layer.bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.decode(grad.dtype), None


def _dtype_of_product(x: Tensor) -> torch.dtype:
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)  # torch knows no autocast of meta
    return torch.get_autocast_dtype(device) if autocast else x.dtype
