"""Types of the C++ extension (csrc/bind.cpp). The module is missing where it could not be built."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

def lzma_version() -> str: ...  # no lzma_* functions where liblzma was missing
def lzma_compress(
    data: Buffer,
    preset: int = 9,
    extreme: bool = False,
    *,
    lc: int = -1,
    lp: int = -1,
    pb: int = -1,
    nice_len: int = -1,
    mode: int = -1,
) -> bytes: ...
def lzma_decompress(data: Buffer, size: int) -> bytes: ...
def gptq_round_block(
    work: NDArray[np.float32],
    codes: NDArray[np.int8],
    row_step: NDArray[np.float32],
    column_step: NDArray[np.float32],
    factor: NDArray[np.float32],
    clip_range: int,
    cost: NDArray[np.float32] | None = None,
    row_class: NDArray[np.int32] | None = None,
    column_class: NDArray[np.int32] | None = None,
    lam: NDArray[np.float32] | None = None,
    threads: int = 0,
) -> None: ...
def pack_bits(
    codes: NDArray[np.int8], bits: int, threads: int = 0, simd: bool = True
) -> NDArray[np.uint8]: ...
def unpack_bits(
    packed: NDArray[np.uint8], columns: int, bits: int, threads: int = 0, simd: bool = True
) -> NDArray[np.int8]: ...
def dequantize_bits(
    packed: NDArray[np.uint8],
    scale: NDArray[np.float32],
    bits: int,
    values: NDArray[np.float32] | NDArray[np.uint16],
    threads: int = 0,
    simd: bool = True,
) -> None: ...
def bits_simd() -> str: ...
def int6_simd() -> bool: ...
def int6_matmul(
    x: NDArray[np.float32] | NDArray[np.uint16],
    packed: NDArray[np.uint8],
    scale: NDArray[np.float32],
    y: NDArray[np.float32] | NDArray[np.uint16],
    threads: int = 0,
    simd: bool = True,
) -> None: ...

class DecodeBlock:
    def __init__(
        self,
        sizes: dict[str, int],
        arrays: dict[str, NDArray[np.float32]],
        attention: NDArray[np.uint8],
        up: NDArray[np.uint8],
        down: NDArray[np.uint8],
        layer_scale: float,
        xsa: bool,
        activation: int,
    ) -> None: ...
    def step(
        self,
        x: NDArray[np.float32],
        x0: NDArray[np.float32],
        value_embed: NDArray[np.float32] | None,
        position: int,
        threads: int = 0,
    ) -> None: ...

def rans_encode(data: Buffer, shapes: Sequence[tuple[int, int, int]], threads: int = 0) -> bytes: ...
def rans_decode(
    payload: Buffer, shapes: Sequence[tuple[int, int, int]], size: int, threads: int = 0
) -> bytes: ...

# Fused CPU passes: operands are contiguous arrays of float32, or of bfloat16 viewed as uint16.
Floats: TypeAlias = NDArray[np.float32] | NDArray[np.uint16]

def passes() -> str: ...
def runnable_passes() -> list[str]: ...
def choose_passes(name: str) -> None: ...
def activate(pre: Floats, hidden: Floats, activation: str, threads: int = 0) -> None: ...
def activate_backward(
    dhidden: Floats, pre: Floats, dpre: Floats, hidden: Floats, activation: str, threads: int = 0
) -> None: ...
def symmetric_product(
    x: Floats, add: Floats | None, out: Floats, alpha: float, beta: float, threads: int = 0
) -> None: ...
def attention(
    q: Floats,
    k: Floats,
    v: Floats,
    gain: NDArray[np.float32],
    cos: NDArray[np.float32],
    sin: NDArray[np.float32],
    y: Floats,
    context: Floats,
    q_rstd: NDArray[np.float32],
    k_rstd: NDArray[np.float32],
    lse: NDArray[np.float32],
    xsa: bool,
    threads: int = 0,
) -> None: ...
def attention_backward(
    dcontext: Floats,
    q: Floats,
    k: Floats,
    v: Floats,
    y: Floats,
    q_rstd: NDArray[np.float32],
    k_rstd: NDArray[np.float32],
    lse: NDArray[np.float32],
    gain: NDArray[np.float32],
    cos: NDArray[np.float32],
    sin: NDArray[np.float32],
    context: Floats,
    dq: Floats,
    dk: Floats,
    dv: Floats,
    dgain: NDArray[np.float32],
    xsa: bool,
    threads: int = 0,
) -> None: ...
def softcap_loss(
    logits: Floats,
    targets: NDArray[np.int64],
    loss: NDArray[np.float32],
    logsumexp: NDArray[np.float32],
    softcap: float,
    z_loss: float,
    gradient: bool,
    threads: int = 0,
) -> None: ...
def residual_norm(
    x: Floats,
    branch: Floats | None,
    x_scale: NDArray[np.float32] | None,
    branch_scale: NDArray[np.float32] | None,
    mixed: Floats | None,
    normed: Floats,
    rstd: NDArray[np.float32],
    scale: float,
    threads: int = 0,
) -> None: ...
def residual_norm_backward(
    dmixed: Floats | None,
    dnormed: Floats,
    x: Floats | None,
    branch: Floats | None,
    x_scale: NDArray[np.float32] | None,
    branch_scale: NDArray[np.float32] | None,
    mixed: Floats,
    rstd: NDArray[np.float32],
    dx: Floats,
    dbranch: Floats | None,
    dscales: NDArray[np.float32] | None,
    scale: float,
    threads: int = 0,
) -> None: ...
def smear_gate(x: Floats, gate: NDArray[np.float32], out: Floats, threads: int = 0) -> None: ...
def smear_gate_backward(
    dout: Floats,
    x: Floats,
    gate: NDArray[np.float32],
    dx: Floats,
    dsum: NDArray[np.float32],
    threads: int = 0,
) -> None: ...
