"""Keys of chunks: BLAKE3, chained, so that a key names the KV of a whole token prefix. Pure; no torch, no I/O.

    root    = BLAKE3-derive_key(ROOT_CONTEXT, namespace digest (32 B) | 0x00)               without a salt
              BLAKE3-derive_key(ROOT_CONTEXT, namespace digest (32 B) | 0x01 | salt)        with one
    key[i]  = BLAKE3(key[i - 1], or root (32 B) | token ids of chunk i, little-endian u32 | extra of chunk i, if any)

Roots use BLAKE3's derive_key mode and chunk keys its plain mode, which set different flags in every compression: no
root can be a chunk key of other input. The parent and the tokens have fixed widths (`chunk_tokens` is part of the
namespace), so the tail of variable length can only be the extra: different input never becomes the same preimage.
`docs/format-keys.md` has worked examples, `tests/golden/keys.json` the pinned values.
"""

from __future__ import annotations

import operator
import sys
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from kvstore_s3.errors import InvalidArgumentError

KEY_BYTES = 32
"""Bytes of a namespace digest, a root key and a chunk key."""

ROOT_CONTEXT = "kvstore-s3 v1 root key"
"""BLAKE3 derive_key context of roots. Part of the format: another string is another cache."""

_MAX_TOKEN_ID = 2**32 - 1

TokenArray = npt.NDArray[np.uint32]
"""Token ids, shape [n], little-endian u32, contiguous."""


def root_key(namespace_digest: bytes, salt: str | bytes | None) -> bytes:
    """Return the 32-byte parent of the first chunk key.

    `salt` separates tenants: the same tokens under another salt share nothing. A str counts as its UTF-8 bytes; an
    empty salt is a salt, and differs from None. Raises `InvalidArgumentError` for any other type or digest length.
    """
    if not isinstance(namespace_digest, bytes) or len(namespace_digest) != KEY_BYTES:
        raise InvalidArgumentError(
            f"a namespace digest is {KEY_BYTES} bytes (Namespace.digest), not {namespace_digest!r}"
        )
    tail = b"\x00" if salt is None else b"\x01" + _salt_bytes(salt)
    return blake3(namespace_digest + tail, derive_key_context=ROOT_CONTEXT).digest()


def chunk_keys(
    root: bytes, token_ids: Any, chunk_tokens: int, *, extra_keys: Mapping[int, bytes] | None = None
) -> list[bytes]:
    """Return the 32-byte keys of all whole chunks of `token_ids`, in order; tokens after the last one are left out.

    `token_ids` is whatever `as_token_array` takes. `extra_keys` binds what token ids do not tell, such as the digest
    of an image behind placeholder tokens, to the chunk (by index) in which it first matters, and so to all after it;
    entries beyond the last whole chunk have no effect. Raises `InvalidArgumentError`.
    """
    if not isinstance(root, bytes) or len(root) != KEY_BYTES:
        raise InvalidArgumentError(f"a root key is {KEY_BYTES} bytes (root_key), not {root!r}")
    if not isinstance(chunk_tokens, int) or isinstance(chunk_tokens, bool) or chunk_tokens < 1:
        raise InvalidArgumentError(f"chunk_tokens must be a positive integer, not {chunk_tokens!r}")
    extras = _check_extras(extra_keys)
    tokens = as_token_array(token_ids)
    content, width = tokens.tobytes(), chunk_tokens * tokens.itemsize
    keys, parent = [], root
    for index in range(len(tokens) // chunk_tokens):
        chunk = parent + content[index * width : (index + 1) * width] + extras.get(index, b"")
        parent = blake3(chunk).digest()
        keys.append(parent)
    return keys


def as_token_array(token_ids: Any) -> TokenArray:
    """Return token ids as a contiguous little-endian u32 array of shape [n]; no copy where it is one already.

    Takes a list, tuple or other sequence of ints, a numpy array or a torch tensor of any integer dtype, on any device,
    of shape [n] or [1, n]. Raises `InvalidArgumentError` for floats, bools, ids below 0 or above 2^32 - 1 (naming
    position and value), and for more than one row: a key names one sequence.
    """
    torch = sys.modules.get("torch")  # who holds a tensor has imported torch; who does not, need not wait for it
    if torch is not None and isinstance(token_ids, torch.Tensor):
        return _from_numpy(_tensor_to_numpy(token_ids), "torch tensor")
    if isinstance(token_ids, np.ndarray):
        return _from_numpy(token_ids, "numpy array")
    if isinstance(token_ids, Sequence) and not isinstance(token_ids, (str, bytes, bytearray, memoryview)):
        return _from_sequence(token_ids)
    raise InvalidArgumentError(
        f"token ids must be a list or tuple of ints, a numpy array or a torch tensor, not {type(token_ids).__name__}"
    )


def _salt_bytes(salt: str | bytes) -> bytes:
    if isinstance(salt, bytes):
        return salt
    if not isinstance(salt, str):
        raise InvalidArgumentError(f"a salt is a str, bytes or None, not {type(salt).__name__}")
    try:
        return salt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidArgumentError("the salt is not valid Unicode (a lone surrogate); pass it as bytes") from error


def _check_extras(extra_keys: Mapping[int, bytes] | None) -> Mapping[int, bytes]:
    extras = extra_keys or {}
    for index, extra in extras.items():
        if not isinstance(index, int) or isinstance(index, bool) or index < 0:
            raise InvalidArgumentError(f"extra_keys is keyed by chunk index, an integer from 0 on, not {index!r}")
        if not isinstance(extra, bytes) or not extra:  # an empty one would be the same key as none
            raise InvalidArgumentError(f"the extra key of chunk {index} must be bytes, at least one, not {extra!r}")
    return extras


def _tensor_to_numpy(tensor: Any) -> npt.NDArray[Any]:
    if tensor.is_floating_point() or tensor.is_complex():  # checked here, as numpy has no bfloat16
        raise InvalidArgumentError(f"token ids must be integers, not a torch tensor of {tensor.dtype}")
    try:
        array_: npt.NDArray[Any] = tensor.detach().cpu().numpy()
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise InvalidArgumentError(f"token ids must be a dense tensor that holds data: {error}") from error
    return array_


def _from_numpy(ids: npt.NDArray[Any], what: str) -> TokenArray:
    if ids.dtype.kind not in "iu":
        raise InvalidArgumentError(f"token ids must be integers, not a {what} of {ids.dtype}")
    if ids.ndim == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.ndim != 1:
        raise InvalidArgumentError(
            f"token ids must have shape [n] or [1, n], not {list(ids.shape)}; pass one row at a time"
        )
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) > _MAX_TOKEN_ID):
        position = int(np.flatnonzero((ids < 0) | (ids > _MAX_TOKEN_ID))[0])
        raise _bad_id(position, int(ids[position]))
    return np.ascontiguousarray(ids, dtype="<u4")


def _from_sequence(ids: Sequence[Any]) -> TokenArray:
    # array() takes bools for ints, so types are looked at first; both passes run at C speed.
    if set(map(type, ids)) <= {int}:
        try:
            return np.frombuffer(array("I", ids), dtype=np.uintc).astype("<u4", copy=False)
        except OverflowError:
            pass
    return np.array([_check_id(position, value) for position, value in enumerate(ids)], dtype="<u4")


def _check_id(position: int, value: Any) -> int:
    """The slow path: numpy integers within a list, or the search for what is wrong."""
    if isinstance(value, (bool, np.bool_)):
        raise _bad_id(position, value)
    try:
        token = operator.index(value)
    except TypeError:
        raise _bad_id(position, value) from None
    if not 0 <= token <= _MAX_TOKEN_ID:
        raise _bad_id(position, value)
    return token


def _bad_id(position: int, value: object) -> InvalidArgumentError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return InvalidArgumentError(f"token id {shown} at position {position} is not an integer from 0 to {_MAX_TOKEN_ID}")
