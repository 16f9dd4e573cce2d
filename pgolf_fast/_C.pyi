"""Types of the C++ codecs (csrc/bind.cpp); the module is missing where it could not be built."""

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

def lzma_compress(data: Buffer, preset: int = 9, extreme: bool = False) -> bytes: ...
def lzma_decompress(data: Buffer, size: int) -> bytes: ...
def int6_pack(codes: NDArray[np.int8]) -> NDArray[np.uint8]: ...
def int6_unpack(packed: NDArray[np.uint8], columns: int) -> NDArray[np.int8]: ...
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
def lzma_version() -> str: ...
def lzma_how() -> str: ...
