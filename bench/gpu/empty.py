"""A kernel that does nothing, for the price of a launch."""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false
import triton
import triton.language as tl


@triton.jit
def empty_kernel(out_ptr, N, BLOCK: tl.constexpr):  # noqa: N803
    """Takes a pointer and a number, as most do."""
