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

def implementations() -> list[str]:
    """What this CPU can run: "portable", and "avx2" where it has it. "auto" takes the last."""
