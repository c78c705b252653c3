"""Products in float32 on the CPU, by the library that is faster there, in the parts in which it is.

torch multiplies float32 matrices by MKL, which has no AVX-512 for processors that are not Intel's: on AMD's
Zen 4 oneDNN, which makes its code for the processor that it finds, takes a tenth to a seventh less time for
x Wᵀ and for the gradient of x. For the gradient of W it has no faster way. What it costs: oneDNN makes a
program of half a MiB for every shape, so rows are filled up to one of sixteen sizes an octave, a
thirty-second more of them on average (none where every micro-batch has a size's number of tokens).

On AMD's processors with AVX2 alone (Zen 3 was measured) MKL is as fast or faster. But in x Wᵀ of up to some
hundred rows with a W of many more rows than columns, as the head of a large vocabulary is, it takes in
parts of 1,024 rows of W two thirds to nine tenths of the time that it takes at once.

Which library multiplies depends on the processor and on the number of rows alone, never on a measurement: a
run that is resumed rounds as one that was not killed. Left out: few rows, for which laying the matrix out
anew in each product takes longer than is won (`cpu_linear.PrepackedWeight` is for those), and matrices that
take no time.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from keel.accel.patches import difference, enabled, refuse, tried

LEAST = 1024  # rows
WORTH = 2**17  # weights of a matrix
# of products in parts: rows of W in a part; x may have so many rows; W as many times more rows than columns
PART, FEW, WIDE = 1024, 512, 4


def faster(rows: int, weight: Tensor) -> bool:
    """Whether products of so many rows with a float32 matrix (n, k) on the CPU are oneDNN's here."""
    return rows >= LEAST and weight.numel() >= WORTH and _is_on()


def size_of(rows: int, weight: Tensor) -> int:
    """To how many rows so many are filled up for a product with a float32 matrix (n, k) on the CPU; the same
    number where oneDNN does not take it."""
    if not faster(rows, weight):
        return rows
    step = 1 << ((rows - 1).bit_length() - 5)
    return -(-rows // step) * step


def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, without gradient. rows: (M, k), contiguous; weight: (n, k), or a view of its transpose."""
    ours = rows.dtype == weight.dtype == torch.float32 and rows.device.type == "cpu"
    if ours and faster(len(rows), weight) and size_of(len(rows), weight) == len(rows):
        return _by_onednn(rows, weight, bias)
    if ours and in_parts(len(rows), weight):
        return _by_parts(rows, weight, bias)
    return linear(rows, weight, bias)


def in_parts(rows: int, weight: Tensor) -> bool:
    """Whether x Wᵀ of so many rows with a float32 matrix (n, k) on the CPU is taken a part of W at a time."""
    n, k = weight.shape
    if rows > FEW or n < WIDE * max(k, PART) or not weight.is_contiguous():
        return False
    return enabled("wide_products") and _is_slow_at_once() and _parts_differ() is None


def prefers_columns() -> bool:
    """Whether products with float32 matrices that are laid out beforehand are faster by MKL, of Wᵀ, than by
    oneDNN as it lays W out. AMD's processors with AVX2 alone: 16 to 160 rows take 0.8 to 0.9 of the time."""
    return enabled("column_products") and _is_slow_at_once()


def _by_parts(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    found = torch.empty(len(rows), len(weight))
    for first in range(0, len(weight), PART):
        part = slice(first, first + PART)
        if bias is None:
            torch.mm(rows, weight[part].t(), out=found[:, part])
        else:
            torch.addmm(bias[part], rows, weight[part].t(), out=found[:, part])
    return found


def _by_onednn(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def _is_on() -> bool:
    return enabled("cpu_products") and torch.backends.mkldnn.enabled and _is_faster() and _differs() is None


@cache
def _is_faster() -> bool:
    """Whether this is a processor on which oneDNN has better code than MKL: AMD's with AVX-512."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and _vendor() == "AuthenticAMD"


@cache
def _is_slow_at_once() -> bool:
    """Whether this is a processor on which MKL is slow with a wide result: AMD's with AVX2 alone."""
    if not torch.backends.mkl.is_available():
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX2" and _vendor() == "AuthenticAMD"


def _vendor() -> str:
    """As the processor names its maker; "" where that cannot be read (not Linux, not x86)."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


@cache
def _differs() -> str | None:
    """torch's own product against oneDNN's, of a matrix and of a transposed view. Of torch, not of a model:
    once."""

    def trial() -> str | None:
        with torch.no_grad(), torch.inference_mode(False), torch.autocast("cpu", enabled=False):
            x, weight = (torch.linspace(-2, 3 + n, n * 40).sin().view(n, 40) for n in (24, 16))
            bias, back = torch.linspace(0, 1, 16), torch.linspace(-1, 1, 24 * 16).cos().view(24, 16)
            pairs = [
                (_by_onednn(x, weight, bias), linear(x, weight, bias)),
                (_by_onednn(back, weight.t(), None), back @ weight),
            ]
        return next((why for pair in pairs if (why := difference("products of float32", *pair))), None)

    why = tried(trial)
    if why is not None:
        refuse("cpu_products", "torch", why)
    return why


@cache
def _parts_differ() -> str | None:
    """torch's own product against the one in parts, with a bias and without. Of torch, not of a model:
    once."""

    def trial() -> str | None:
        with torch.no_grad(), torch.inference_mode(False), torch.autocast("cpu", enabled=False):
            n = 2 * PART + 3
            x, weight = (
                torch.linspace(-2, 3, 24).sin().view(3, 8),
                torch.linspace(-1, 4, n * 8).view(n, 8).cos(),
            )
            biases = None, torch.linspace(0, 1, n)
            pairs = [(_by_parts(x, weight, bias), linear(x, weight, bias)) for bias in biases]
        return next((why for pair in pairs if (why := difference("products in parts", *pair))), None)

    why = tried(trial)
    if why is not None:
        refuse("wide_products", "torch", why)
    return why
