"""Triton's interpreter, repaired and made strict, for tests of kernels on machines without a GPU.

Repairs (needed with triton 3.6 to 3.9, each measured): loop bounds under numpy 2.4, bfloat16 products, casts
to bfloat16 that round to nearest. Strictness: any other arithmetic on bfloat16 is rejected, because the
interpreter would compute on the bit patterns, and a load or store outside every tensor argument is an error.
"""

from __future__ import annotations

import os

import numpy as np


class OutOfBounds(Exception):
    """A kernel touched memory outside all tensors it was given."""


def install() -> None:
    """Patch the interpreter, once per process. TRITON_INTERPRET must be set before Triton is imported."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("set TRITON_INTERPRET=1 before triton is imported")
    import triton.language as tl
    import triton.runtime.interpreter as interpreter

    if getattr(interpreter, "_pgolf_installed", False):
        return
    interpreter._pgolf_installed = True
    _repair_loop_bounds(interpreter)
    _repair_bfloat16(interpreter, tl)
    _check_memory(interpreter)


def _repair_loop_bounds(interpreter) -> None:
    original = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    interpreter._patch_lang_tensor = patched


def _repair_bfloat16(interpreter, tl) -> None:
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    dot, cast, binary = builder.create_dot, builder.cast_impl, builder.binary_op

    def widened(value):
        if value.dtype.scalar != tl.bfloat16:
            return value
        return handle((value.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, d, *rest):
        return dot(self, widened(a), widened(b), d, *rest)

    def cast_impl(self, source, to):
        if source.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
            return cast(self, source, to)
        bits = np.ascontiguousarray(source.data).view(np.uint32).astype(np.uint64)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return handle(np.where(np.isnan(source.data), np.uint16(0x7FC0), nearest), to.scalar)

    def binary_op(self, a, b, operation):
        if a.dtype.scalar == tl.bfloat16:
            raise TypeError(
                "bfloat16 arithmetic is wrong in the interpreter: convert to float32 after the load"
            )
        return binary(self, a, b, operation)

    builder.create_dot, builder.cast_impl, builder.binary_op = create_dot, cast_impl, binary_op


def _check_memory(interpreter) -> None:
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, prepare = builder.create_masked_load, builder.create_masked_store, executor._init_args_hst
    allowed: list[tuple[int, int]] = []

    def check(kind, pointers, mask):
        addresses = pointers.data.reshape(-1).astype(np.int64)
        if mask is not None:
            active = mask.data.reshape(-1).astype(bool)
            addresses = addresses[np.broadcast_to(active, addresses.shape)]
        element = getattr(pointers.dtype, "element_ty", None)
        size = max(1, element.primitive_bitwidth // 8) if element is not None else 1
        inside = np.zeros(addresses.shape, bool)
        for low, high in allowed:
            inside |= (addresses >= low) & (addresses + size <= high)
        if not inside.all():
            raise OutOfBounds(f"{kind}: {int((~inside).sum())} of {addresses.size} active lanes are outside")

    def masked_load(self, pointers, mask, *rest):
        check("load", pointers, mask)
        return load(self, pointers, mask, *rest)

    def masked_store(self, pointers, value, mask, *rest):
        check("store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def init_args(self, args, kwargs):
        prepared = prepare(self, args, kwargs)
        allowed.clear()
        for tensor in [*prepared[0], *prepared[1].values()]:
            if hasattr(tensor, "data_ptr") and tensor.numel():
                span = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
                allowed.append((tensor.data_ptr(), tensor.data_ptr() + span * tensor.element_size()))
        return prepared

    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
    executor._init_args_hst = init_args
