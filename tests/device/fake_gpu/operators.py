"""Torch's operators on the fake runtime (runtime.cpp): they run on the CPU, on views of what is a GPU's memory there.

What copies bytes is torch's own, and calls the runtime as it does on a GPU. All else would be a kernel: it counts as
one that was launched, with the check that torch makes behind each, and so finds errors that others left behind.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map

RUNTIME = ctypes.CDLL(None)
"""The preloaded one."""
RUNTIME.fake_launch.argtypes = [ctypes.c_void_p]

OWN = ("empty.", "empty_strided", "as_strided", "view", "_reshape_alias", "unfold", "alias", "resize_", "set_")
"""Operators, by how their names begin, that work without a kernel, or call the runtime themselves."""
OWN_TOO = {"record_stream", "_local_scalar_dense", "is_pinned", "_pin_memory"}
MIXING = {"index", "index_put", "_index_put_impl"}
"""Operators that take indices from the host, too."""

_OWN_COPY = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
"""Torch's own `copy_` is the same for all devices."""
_library = torch.library.Library("aten", "IMPL")


def install() -> None:
    """For the rest of the process."""
    for backend in (torch.backends.cuda.enable_flash_sdp, torch.backends.cuda.enable_mem_efficient_sdp):
        backend(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # kernels are overridden, which is meant
        for name in torch._C._dispatch_get_registrations_for_dispatch_key("CUDA"):
            namespace, _, short = name.partition("::")
            if namespace == "aten" and not short.startswith(OWN) and short not in OWN_TOO:
                _library.impl(short, _redispatch(_find(short)), "CUDA")
        _library.impl("copy_", _copy, "CUDA")
    torch.cuda._sleep = lambda cycles: launch(torch.device("cuda", torch.cuda.current_device()))


def launch(device: torch.device) -> None:
    """Count a kernel in the current stream of `device`. Raises torch's error where the runtime has one."""
    with torch.cuda.device(device):
        fault = RUNTIME.fake_launch(torch.cuda.current_stream().cuda_stream)
    if fault:
        raise torch.AcceleratorError(f"CUDA error: {fault}")


def _find(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _redispatch(operator: Any) -> Callable[..., Any]:
    schema = operator._schema
    name = schema.name.partition("::")[2].rstrip("_")

    def run(*arguments: Any, **options: Any) -> Any:
        device = _device_of(name, arguments, options)
        launch(device)
        given, named = tree_map(_view_here, (arguments, options))
        out = operator(*given, **named)
        changed = [
            (_argument(schema, at, arguments, options), _argument(schema, at, given, named))
            for at, argument in enumerate(schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        for there, view in changed:
            if isinstance(there, torch.Tensor) and there.shape != view.shape:  # an `out` that was to be resized
                there.resize_(view.shape)
                _view_here(there).copy_(view)
        if changed:
            results = tuple(there for there, _ in changed)
            return results[0] if len(results) == 1 else results
        return tree_map(lambda value: _put_there(value, device), out)

    return run


def _argument(schema: Any, at: int, arguments: Any, options: Any) -> Any:
    argument = schema.arguments[at]
    return options[argument.name] if argument.kwarg_only or at >= len(arguments) else arguments[at]


def _device_of(name: str, arguments: Any, options: Any) -> torch.device:
    """Where the operator works. As torch, which takes numbers from the host, and indices for some operators."""
    tensors = [value for value in tree_flatten((arguments, options))[0] if isinstance(value, torch.Tensor)]
    devices = {value.device for value in tensors if value.device.type == "cuda"}
    from_host = any(value.device.type == "cpu" and value.dim() > 0 for value in tensors)
    if len(devices) > 1 or (from_host and name not in MIXING):
        raise RuntimeError(f"expected all tensors on the same device, but {name} found {devices} and the host's")
    asked = options.get("device")
    if devices:
        return devices.pop()
    here = torch.device("cuda", torch.cuda.current_device())
    return here if asked is None or asked.index is None else asked


def _view_here(value: Any) -> Any:
    """A tensor of the CPU in the same memory; for a device, the CPU."""
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if not isinstance(value, torch.Tensor) or value.device.type != "cuda":
        return value
    storage = value.untyped_storage()
    if value.numel() == 0:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    length = storage.nbytes() // value.element_size() * value.element_size()
    memory = (ctypes.c_uint8 * length).from_address(storage.data_ptr())
    flat = torch.frombuffer(memory, dtype=torch.uint8).view(value.dtype)
    return flat.as_strided(value.shape, value.stride(), value.storage_offset())


def _put_there(value: Any, device: torch.device) -> Any:
    if not isinstance(value, torch.Tensor) or value.device.type == "cuda":
        return value
    there = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    _view_here(there).copy_(value)
    return there


def _copy(to: torch.Tensor, values: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    within = to.device == values.device
    alike = to.dtype == values.dtype and to.is_contiguous() and values.is_contiguous() and to.shape == values.shape
    if within and not alike:  # a kernel; all else is bytes, or first made so by this operator
        launch(to.device)
        _view_here(to).copy_(_view_here(values))
        return to
    return torch.ops.aten.copy_.default.redispatch(_OWN_COPY, to, values, non_blocking)
