"""A linear layer whose weight is stored in fewer bits than the computation uses; `storage.py` describes the formats.

Weights are (out, in): output features, input features.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST_SCALE = 1e-12  # avoids dividing by zero for an output channel whose weights are all zero
FP8_MAX, INT8_MAX = 448, 127  # largest finite values of e4m3 and of int8
ROWS = 256  # rows that are encoded at a time, as temporary fp32 copies take several times their memory; a guess
NF4_BLOCK = 64  # weights that share a scale; Dettmers et al. 2023


@dataclass(frozen=True)
class Scaled:
    """8-bit values, with a scale per output channel (row) that maps its largest absolute weight to `largest`."""

    dtype: torch.dtype
    largest: int

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """`bits` (out, in) uint8 and `scale` (out, 1), fp32 viewed as int32."""
        parts = [self._encode(rows) for rows in weight.split(len(weight) if weight.is_meta else ROWS)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _encode(self, weight: Tensor) -> dict[str, Tensor]:
        peak = torch.linalg.vector_norm(weight, torch.inf, dim=1, keepdim=True, dtype=torch.float32)
        scale = peak.clamp_(min=SMALLEST_SCALE) / self.largest
        scaled = weight / scale
        scaled = scaled if self.dtype.is_floating_point else scaled.round_()
        return {"bits": scaled.to(self.dtype).view(torch.uint8), "scale": scale.view(torch.int32)}

    def decode(self, layer: "StoredLinear", dtype: torch.dtype) -> Tensor:
        bits, scale = layer.bits.view(self.dtype), layer.scale.view(torch.float32)
        if self.dtype.is_floating_point:  # torch multiplies no float8, so that the cast takes a kernel of its own
            return bits.to(dtype).mul_(scale)
        return torch.mul(bits, scale, out=torch.empty_like(bits, dtype=dtype))


class Cast:
    """8-bit values without a scale."""

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """`bits` (out, in) uint8."""
        # Clamped, because the cast turns larger values into NaN.
        return {"bits": weight.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)}

    def decode(self, layer: "StoredLinear", dtype: torch.dtype) -> Tensor:
        return layer.bits.view(torch.float8_e4m3fn).to(dtype)


class NormalFloat:
    """4-bit NormalFloat values, by bitsandbytes."""

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
    """A frozen linear layer that stores its weight in fewer bits and decodes it for each product.

    The parameters are integer tensors that hold the bits of other dtypes. Casts of the model therefore leave them
    alone, every collective can send them, and no library mistakes their dtype for the model's.

    Args:
        linear: The layer to replace; if it is on the meta device, loading fills the weight in by `encode`.
        storage: Key of METHODS.
        dtype: Dtype of the property `weight`; None is that of the layer.
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
        """The weight (out, in), a decoded copy; changes to it are lost."""
        return self.decode(self.dtype)

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """The tensors that store a weight (out, in), by the names of the parameters that hold them."""
        return METHODS[self.storage].encode(weight)

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) in `dtype`."""
        return METHODS[self.storage].decode(self, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self)

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        device = "cpu" if self.bits is None else self.bits.device  # streaming takes the bits away while the rest moves
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=device)).dtype  # as if it were the weight's
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, storage={self.storage}"


class _Product(torch.autograd.Function):
    """x Wᵀ + b; autograd saves neither x nor W, and the backward pass decodes W again."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: StoredLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.decode(_dtype_of_product(x)), layer.bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.decode(grad.dtype), None


def _dtype_of_product(x: Tensor) -> torch.dtype:
    """The autocast dtype, or that of x without autocast."""
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)  # torch knows no autocast of meta
    return torch.get_autocast_dtype(device) if autocast else x.dtype
