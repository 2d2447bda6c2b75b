"""Paged attention on a CPU: a C++ kernel that reads KV blocks where they lie.

The arithmetic and its order are in `cpu_kernels.cpp`, compiled at first use (`engine.native_library`). Results for a
sequence are the same bits whatever else is in the batch and however many threads run.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch

from engine.attention.base import AttentionBatch, LayerCache, LayerSpec
from engine.native_library import NativeBuildError, load

SOURCE = Path(__file__).with_name("cpu_kernels.cpp")


class _Call(ctypes.Structure):
    """`Call` in `cpu_kernels.cpp`, field for field; strides are in elements."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("query", "key", "value", "output", "sinks")],
        *[(name, ctypes.c_void_p) for name in ("query_start", "context_lens", "block_tables")],
        *[(name, ctypes.c_int64) for name in ("query_stride_token", "query_stride_head")],
        *[(name, ctypes.c_int64) for name in ("key_stride_block", "key_stride_token", "key_stride_head")],
        *[(name, ctypes.c_int64) for name in ("value_stride_block", "value_stride_token", "value_stride_head")],
        ("table_stride", ctypes.c_int64),
        *[(name, ctypes.c_int32) for name in ("sequences", "table_width", "num_blocks", "block_size")],
        *[(name, ctypes.c_int32) for name in ("query_heads", "kv_heads", "key_dim", "value_dim")],
        *[(name, ctypes.c_int32) for name in ("window", "threads")],
        *[(name, ctypes.c_float) for name in ("scale", "softcap")],
    ]


_FAILURES = {
    1: "context_lens, query_start and the width of block_tables contradict each other",
    2: "block_tables names a block that the cache does not have",
}


class CpuAttention:
    """The `AttentionBackend` for CPUs: fp32 and bf16, any head size and block size, every option of `LayerSpec`."""

    name = "cpu"

    @property
    def block_size_multiple(self) -> int:
        """Any block size will do."""
        return 1

    @property
    def capturable(self) -> bool:
        """No: there is nothing to replay on a CPU."""
        return False

    def unsupported(self, spec: LayerSpec, dtype: torch.dtype, device: torch.device) -> str | None:
        """Say why the kernel cannot serve the layer: device, dtype, head counts, or no compiler on this machine."""
        if device.type != "cpu":
            return f"the CPU kernel cannot read memory on {device}"
        if dtype not in (torch.float32, torch.bfloat16):
            return f"the CPU kernel stores float32 or bfloat16, not {dtype}"
        if spec.query_heads % spec.kv_heads:
            return f"{spec.query_heads} query heads do not divide into {spec.kv_heads} KV heads"
        try:
            _kernels()
        except NativeBuildError as error:
            return str(error)
        return None

    def write(self, key: torch.Tensor, value: torch.Tensor, cache: LayerCache, slots: torch.Tensor) -> None:
        """Store `key[T, kv_heads, key_dim]` and `value[T, kv_heads, value_dim]` into `slots[T]`.

        Raises:
            IndexError: a slot lies outside the cache; the valid ones are written.
        """
        library, threads = _kernels(), torch.get_num_threads()
        slots = slots.contiguous()
        for rows, pages in ((key, cache.key), (value, cache.value)):
            if rows.dtype != pages.dtype:
                raise TypeError(f"cannot store {rows.dtype} in a cache of {pages.dtype}")
            rows, size = _rows(rows), pages.element_size()
            tokens, heads, dim = rows.shape
            num_slots = pages.shape[0] * pages.shape[1]
            bad = library.hetserve_write(
                rows.data_ptr(), rows.stride(0) * size, rows.stride(1) * size,
                pages.data_ptr(), pages.stride(0) * size, pages.stride(1) * size, pages.stride(2) * size,
                slots.data_ptr(), tokens, heads, dim * size, pages.shape[1], num_slots, threads,
            )  # fmt: skip
            if bad >= 0:
                raise IndexError(f"slot {int(slots[bad])} of token {bad} is not in a cache of {num_slots} slots")

    def attend(
        self,
        query: torch.Tensor,
        cache: LayerCache,
        batch: AttentionBatch,
        spec: LayerSpec,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return `[T, query_heads, value_dim]` for `query[T, query_heads, key_dim]`, in the cache's dtype.

        Raises:
            IndexError: lengths that contradict each other, or a block table that points outside the cache.
        """
        library = _kernels()
        key, value = cache.key, cache.value
        if query.dtype != key.dtype:
            raise TypeError(f"a query of {query.dtype} cannot attend over a cache of {key.dtype}")
        query, tables = _rows(query), _rows(batch.block_tables)
        query_start, context_lens = batch.query_start.contiguous(), batch.context_lens.contiguous()
        if sinks is not None:
            sinks = sinks.float().contiguous()
        output = torch.empty((query.shape[0], spec.query_heads, spec.value_dim), dtype=query.dtype)
        call = _Call(
            query.data_ptr(), key.data_ptr(), value.data_ptr(), output.data_ptr(),
            None if sinks is None else sinks.data_ptr(),
            query_start.data_ptr(), context_lens.data_ptr(), tables.data_ptr(),
            query.stride(0), query.stride(1),
            key.stride(0), key.stride(1), key.stride(2),
            value.stride(0), value.stride(1), value.stride(2),
            tables.stride(0),
            context_lens.shape[0], tables.shape[1], key.shape[0], key.shape[1],
            spec.query_heads, spec.kv_heads, spec.key_dim, spec.value_dim,
            spec.sliding_window or 0, torch.get_num_threads(),
            spec.scale, spec.softcap or 0.0,
        )  # fmt: skip
        run = library.hetserve_attend_f32 if key.dtype == torch.float32 else library.hetserve_attend_bf16
        failure = run(ctypes.byref(call))
        if failure:
            raise IndexError(_FAILURES[failure])
        return output


@cache
def _kernels() -> ctypes.CDLL:
    library = load(SOURCE)
    library.hetserve_attend_f32.argtypes = library.hetserve_attend_bf16.argtypes = [ctypes.POINTER(_Call)]
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.hetserve_write.argtypes = [pointer, *[integer] * 2, pointer, *[integer] * 3, pointer, *[integer] * 5, ctypes.c_int]
    return library


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, with its last dimension dense."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
