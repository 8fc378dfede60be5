"""Weights in fewer bits for inference: int8 rows, int4 groups for the depth decoder, bfloat16. A model changed here only talks.

Each matrix product is one call of a PyTorch operator that this CPU has been seen to run (`int8_kernel` tries them once):

    weight    aten::_weight_int8pack_mm: int8 rows, bfloat16 activations
    dynamic   quantized::linear_dynamic (FBGEMM; VNNI where there is): int8 rows, activations rounded to 8 bits too
    none      no such operator here: weights are rounded all the same, products stay float32, and the note says so

Rows are symmetric, one scale per output channel. Weights that were stored as int8 rows (checkpoint.py) come out with the
same integers again: computing in int8 then rounds activations only. Sums are made in float32 or int32 everywhere.
`weight` comes first: `dynamic` is up to twice as fast on large matrices, but it rounds activations with one scale for all
rows of a call, which costs far more of the distribution than the weights do (benchmark.py fast shows both).

    note = quantise(model, "int8")          # in place; a line that says what runs
"""
from __future__ import annotations

import functools
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architecture import CSM, FoldedDepth
from config import PRECISIONS
from layers import Attention, Product, SwiGLU

SMALL = 4096             # numbers: smaller matrices stay as they are
GROUP = 32               # weights that share a scale and an offset in int4
LANES = 16               # int4 rows come in multiples of this


def rows_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (out, in) float -> int8 (out, in) and float32 scales (out,): weight ~ q * scale, |q| <= 127."""
    weight = weight.detach().float().contiguous()
    scale = (weight.abs().amax(1) / 127).clamp(min=1e-12)
    return (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def groups_int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """weight (out, in), in a multiple of GROUP -> q (out, in) in 0..15, scale and offset (in / GROUP, out): weight ~ (q - 8) * scale + offset."""
    out, columns = weight.shape
    grouped = weight.detach().float().reshape(out, columns // GROUP, GROUP)
    low, high = grouped.amin(-1), grouped.amax(-1)                             # (out, groups)
    scale = ((high - low) / 15).clamp(min=1e-12).bfloat16().float()
    offset = (low + 8 * scale).bfloat16().float()
    q = ((grouped - offset[..., None]) / scale[..., None] + 8).round().clamp(0, 15)
    return q.view(out, columns).int(), scale.T.contiguous(), offset.T.contiguous()


# ----------------------------------------------------------------------------- one product: float32 x (M, in) -> float32 (M, out)

class Wide(Product):
    """bfloat16 weights and activations, sums in float32."""

    def __init__(self, weight: Tensor):
        self.tensors = (weight.detach().bfloat16().contiguous(),)

    @staticmethod
    def run(x: Tensor, *tensors: Tensor) -> Tensor:
        return F.linear(x.bfloat16(), tensors[0]).float()


class WeightOnly(Product):
    """int8 rows, bfloat16 activations; the rows' scales stay float32."""

    def __init__(self, weight: Tensor):
        q, scale = rows_int8(weight)
        self.tensors = q, torch.ones(len(q), dtype=torch.bfloat16), scale

    @staticmethod
    def run(x: Tensor, *tensors: Tensor) -> Tensor:
        q, ones, scale = tensors
        return torch.ops.aten._weight_int8pack_mm(x.to(torch.bfloat16, memory_format=torch.contiguous_format), q, ones) * scale


class Dynamic(Product):
    """int8 rows; activations to 8 bits with one scale per call."""

    def __init__(self, weight: Tensor):
        q, scale = rows_int8(weight)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                                    # upstream plans to move these operators elsewhere
            made = torch._make_per_channel_quantized_tensor(q, scale.double(), torch.zeros(len(q), dtype=torch.long), 0)
            packed = torch.ops.quantized.linear_prepack(made, None)
        # without VNNI two products of 8 bits can overflow the 16 that hold their sum
        self.tensors, self.size = (packed, not torch.cpu._is_vnni_supported()), q.nbytes + scale.nbytes

    @staticmethod
    def run(x: Tensor, *tensors) -> Tensor:
        return torch.ops.quantized.linear_dynamic(x, *tensors)

    @property
    def nbytes(self) -> int:
        return self.size


class Rounded(Product):
    """int8 rows in float32: for a machine without a kernel."""

    def __init__(self, weight: Tensor):
        q, scale = rows_int8(weight)
        super().__init__(q * scale[:, None])


class Int4(Product):
    """int4 in groups of GROUP along a row, bfloat16 activations. Rows are filled up to a multiple of LANES."""

    def __init__(self, weight: Tensor):
        self.rows = len(weight)
        q, scale, offset = groups_int4(F.pad(weight.detach(), (0, 0, 0, -len(weight) % LANES)))
        self.tensors = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1), torch.stack([scale, offset], -1).bfloat16().contiguous()

    @staticmethod
    def run(x: Tensor, *tensors: Tensor) -> Tensor:
        packed, scales = tensors                                               # scales (in / GROUP, out, 2)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x.to(torch.bfloat16, memory_format=torch.contiguous_format), packed, GROUP, scales).float()

    def __call__(self, x: Tensor) -> Tensor:
        return self.run(x, *self.tensors)[:, :self.rows]


KERNELS = {"dynamic": Dynamic, "weight": WeightOnly, "none": Rounded}


@functools.cache
def _works(kind) -> bool:
    """Whether this product runs here and is near the float32 one."""
    g = torch.Generator().manual_seed(0)
    weight, x = torch.randn(64, 64, generator=g), torch.randn(3, 64, generator=g)
    try:
        error = (kind(weight)(x) - x @ weight.T).norm() / (x @ weight.T).norm()
    except (RuntimeError, AttributeError, TypeError):
        return False
    return bool(error < (0.2 if kind is Int4 else 0.03))


def int8_kernel() -> str:
    """The first of "weight", "dynamic" that works on this CPU, else "none"."""
    return next((name for name in ("weight", "dynamic") if _works(KERNELS[name])), "none")


# ----------------------------------------------------------------------------- a whole model

class Quantised(nn.Module):
    """Stands for a Linear. Holds no parameters: what it computes with is not what is saved."""

    def __init__(self, product: Product | None, bias: Tensor | None = None):
        super().__init__()
        self.product, self.bias = product, bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), float32."""
        y = self.product(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        raise ValueError(f"{prefix.rstrip('.')} was quantised to compute with: save the model before quantise(), or use checkpoint.py --quantise")


def _take_place(model: nn.Module, make, skip: tuple = ()) -> int:
    """Every large Linear becomes a Quantised one, products of the same input as one; bytes of them all. skip: modules left alone."""
    total = 0

    def stand_in(*linears: nn.Linear) -> Quantised:
        nonlocal total
        product = make(torch.cat([linear.weight for linear in linears]))
        total += product.nbytes
        return Quantised(product, None if linears[0].bias is None else linears[0].bias.detach())

    left = {inner for outer in skip if outer is not None for inner in outer.modules()}
    modules = [module for module in model.modules() if module not in left]
    for module in modules:
        names = {Attention: ("q_proj", "k_proj", "v_proj"), SwiGLU: ("w1", "w3")}.get(type(module), ())
        if names and getattr(module, names[0]).weight.numel() >= SMALL:
            joined = stand_in(*(getattr(module, name) for name in names))
            for name in names:
                setattr(module, name, Quantised(None))
            getattr(module, names[0]).joined = joined
    for module in modules:
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and child.weight.numel() >= SMALL:
                setattr(module, name, stand_in(child))
    return total


def lay_out(model: nn.Module) -> None:
    """Keep the numbers, store each matrix of a Linear the other way round: a product with one row of input then reads memory in order."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.numel() >= SMALL:
            module.weight.data = module.weight.data.t().contiguous().t()


@torch.no_grad()
def quantise(model: CSM, precision: str = "int8", kernel: str | None = None) -> str:
    """Make `model` (float32, on the CPU unless bf16) compute in `precision`, in place; returns a line that says what runs.

    "fp32" only lays the weights out for one row at a time. "int4-depth": the depth decoder in int4, all else in int8.
    kernel: one of KERNELS for int8, to measure; None: int8_kernel(). Embeddings, norms and heads of the teacher-forced
    depth pass stay float32. ValueError for an unknown precision, a device without a kernel, a model already quantised.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}: use --precision {'|'.join(PRECISIONS)}")
    if getattr(model, "precision", "fp32") != "fp32":
        raise ValueError(f"the model computes in {model.precision} already: load it again for --precision {precision}")
    device = model.text_embeddings.weight.device
    if precision == "fp32":
        lay_out(model)
        return "float32"
    if precision.startswith("int") and device.type != "cpu":
        raise ValueError(f"{precision} runs on a CPU, the model is on {device}: use --precision bf16, or --device cpu")
    kernel = kernel or int8_kernel()
    make, depth, note = {"bf16": (Wide, Wide, "bfloat16 weights")}.get(precision, (KERNELS[kernel],) * 2 + (_note(kernel),))
    if precision == "int4-depth":
        if not _works(Int4) or any(n % GROUP for n in (model.cfg.depth.width, model.cfg.depth.ffn)):
            note += "; no int4 operator for this depth decoder here: int8"
        else:
            depth, note = Int4, note + "; depth decoder int4 (aten::_weight_int4pack_mm_for_cpu)"
    fast = FoldedDepth(model, depth)
    model.quantised_bytes = _take_place(model.decoder, depth) + _take_place(model, make, skip=(model.decoder, model.memory_writer))
    model.keep_folded(fast)
    model.precision = precision
    return note


def _note(kernel: str) -> str:
    return {"dynamic": "int8 (quantized::linear_dynamic)", "weight": "int8 weights (aten::_weight_int8pack_mm)",
            "none": f"no int8 operator in torch {torch.__version__} for this CPU: weights rounded to int8, products in float32"}[kernel]


def depth_products(model: CSM, precision: str) -> FoldedDepth:
    """The depth decoder of a float32 model in another precision, beside the model, which stays as it is: to draft with."""
    kinds = {"fp32": Product, "bf16": Wide, "int8": KERNELS[int8_kernel()], "int4-depth": Int4}
    return FoldedDepth(model, kinds[precision])
