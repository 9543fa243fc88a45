"""Native codec kernels. Arrays are C-order in their last two axes; the GIL is released while they run."""

import numpy as np
import numpy.typing as npt

def lossless_encode(values: npt.NDArray[np.unsignedinteger], *, implementation: str = "auto") -> bytes:
    """Code uint16 bit patterns of bf16, shape [layers, kinds, tokens, heads, head_dim], by docs/format-lossless.md.

    Every implementation gives the same bytes. Raises TypeError (not such an array) and ValueError (empty, last two axes
    not contiguous, 2 GiB or more in one head, no such implementation).
    """

def lossless_decode(
    payload: memoryview,
    out: npt.NDArray[np.unsignedinteger],
    *,
    head_begin: int,
    section_heads: int,
    implementation: str = "auto",
) -> int:
    """Decode heads `head_begin` to `head_begin + out.shape[3]` of a payload of `section_heads` heads into `out`.

    Answers 0, or the number of a `kvstore_s3.errors.BitstreamFault`: 1 TRUNCATED, 13 BAD_PAYLOAD; `out` is then
    undefined. Whatever the bytes, it reads within `payload`, writes within `out` and allocates nothing. Raises
    TypeError and ValueError for arguments that are no section.
    """

class ScalableTables:
    """The tables of the scalable codec (docs/format-scalable.md), ready to decode and encode with."""

    def __init__(
        self,
        first: npt.NDArray[np.uint8],
        base: npt.NDArray[np.uint16],
        refine: npt.NDArray[np.uint16],
        shift: npt.NDArray[np.float32],
    ) -> None:
        """Take first [3], base [48, 256], refine [2, 48, 4, 2] and shift [3, 48].

        Raises ValueError for what the format forbids in classes that are coded; the rest is not looked at.
        """

def scalable_encode(
    tables: ScalableTables,
    classes: npt.NDArray[np.uint8],
    y: npt.NDArray[np.float32],
    *,
    levels: int = 3,
    implementation: str = "auto",
) -> tuple[bytes, list[bytes], bytes]:
    """Round components y [tokens, n'] (finest steps, C-contiguous) and code them: (states, words per level, escapes).

    `classes` [n'] are 0 to 47. What the levels that code a class cannot express is cut to the nearest that they can;
    NaN is coded as the lowest number. Every implementation gives the same bytes. Raises TypeError and ValueError.
    """

def scalable_decode(
    tables: ScalableTables,
    classes: npt.NDArray[np.uint8],
    states: bytes | memoryview | npt.NDArray[np.uint8],
    words: list[bytes] | list[memoryview] | list[npt.NDArray[np.uint8]],
    escapes: bytes | memoryview | npt.NDArray[np.uint8],
    y: npt.NDArray[np.float32],
    *,
    object_levels: int,
    implementation: str = "auto",
) -> int:
    """Decode the first `len(words)` of an object's levels into all of y [tokens, n'], in finest steps.

    Components that are not coded get 0. Answers 0, or 13 (BAD_PAYLOAD) where the bytes do not fit; y is then undefined.
    Reads within the given bytes and writes within y, whatever the bytes. Every implementation gives the same floats.
    Raises TypeError and ValueError for arguments of wrong shapes.
    """

def scalable_prepare(
    values: npt.NDArray[np.unsignedinteger],
    dtype_id: int,
    x: npt.NDArray[np.float32],
    mean: npt.NDArray[np.float32] | None,
    cos: npt.NDArray[np.float32] | None,
    sin: npt.NDArray[np.float32] | None,
    style: int,
    rotated: npt.NDArray[np.uint8] | None,
    *,
    implementation: str = "auto",
) -> npt.NDArray[np.uint8]:
    """Fill x [tokens, heads x layers x kinds x dim] with values [layers, kinds, tokens, heads, dim] as float32.

    `dtype_id` 1 bfloat16, 2 float16 (both uint16), 3 float32 (uint32). K of layers that `rotated` [layers] names is
    turned back by cos and sin [tokens, pairs]; `style` 0 none (then all three may be None), 1 halves, 2 pairs. Then
    `mean` (of x's columns) is subtracted. Answers uint8 [tokens]: 1 where a token has a NaN or an infinity; its row of
    x is 0. Every implementation gives the same floats. Raises TypeError and ValueError.
    """

def scalable_finish(
    x: npt.NDArray[np.float32],
    scale: npt.NDArray[np.float32] | None,
    mean: npt.NDArray[np.float32] | None,
    cos: npt.NDArray[np.float32] | None,
    sin: npt.NDArray[np.float32] | None,
    style: int,
    rotated: npt.NDArray[np.uint8] | None,
    dtype_id: int,
    out: npt.NDArray[np.unsignedinteger],
    *,
    implementation: str = "auto",
) -> None:
    """Write mean + scale * x, K rotated, to the nearest (ties to even) into `out`: `scalable_prepare` reversed."""

def scatter_blocks(
    blocks: npt.NDArray[np.generic], numbers: npt.NDArray[np.int64], rows: npt.NDArray[np.generic]
) -> None:
    """`blocks[numbers] = rows`: blocks [blocks, ...] and rows [len(numbers), ...] of any strides, which do not overlap.

    Squares of items are transposed in registers where the two sides are dense in different axes. Raises ValueError for
    other shapes, other item sizes and numbers that are no block's.
    """

def gather_blocks(
    blocks: npt.NDArray[np.generic], numbers: npt.NDArray[np.int64], rows: npt.NDArray[np.generic]
) -> None:
    """`rows[...] = blocks[numbers]`; see `scatter_blocks`."""

def implementations() -> list[str]:
    """What this CPU can run: "portable", and "avx2" and "avx512" where it has them. "auto" takes the last."""
