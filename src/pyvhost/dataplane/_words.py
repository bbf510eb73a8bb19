"""The sum of a block of words, sixteen 32 bit words at a time: what makes a checksum fast.

Promises: compiled and plain give the same sum. Never: checks the address.
"""

from __future__ import annotations

import ctypes
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pyvhost.dataplane.policy import PLAIN

#: Bytes that one `sum_block` adds up.
BLOCK = 64

_Block = ctypes.c_uint32 * (BLOCK // 4)


def _plain_sum_block(address: int) -> int:
    return sum(_Block.from_address(int(address)))


@intrinsic
def _compiled_sum_block(typing_context: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        narrow = ir.VectorType(ir.IntType(32), BLOCK // 4)
        wide = ir.VectorType(ir.IntType(64), BLOCK // 4)
        words = builder.load(builder.inttoptr(arguments[0], narrow.as_pointer()), align=1)
        name = f"llvm.vector.reduce.add.v{BLOCK // 4}i64"
        reduce = builder.module.globals.get(name)
        if reduce is None:
            reduce = ir.Function(builder.module, ir.FunctionType(ir.IntType(64), [wide]), name)
        return builder.call(reduce, [builder.zext(words, wide)])

    return types.int64(types.int64), codegen


#: The sum of the sixteen native 32 bit words at `address`, which need not be aligned.
sum_block = _plain_sum_block if PLAIN else _compiled_sum_block
