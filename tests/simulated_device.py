"""A device ``simulated`` with real numbers: values on the CPU behind tensors that obey the rules of CUDA.

What CUDA refuses is refused: operands on two devices (0-dimensional CPU tensors may enter pointwise operators), a CPU
generator for a draw on the device, a CPU tensor indexed by a device tensor, ``numpy()``. ``LOG`` counts what makes the
host wait for the device, and copies to it. Import it in a process of its own: torch has room for one such device.
"""

import contextlib
import gc
from collections import Counter
from functools import cache, partial
from typing import NamedTuple

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "simulated"
LOG = Counter()
"""Counts of ``wait: <operator>``, ``copy to device`` and ``pinned copy to device``."""

# The result decides a shape or a Python value, so that the host waits until all that was queued is done.
WAITING = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique_consecutive", "_unique2",
    "unique_dim", "bincount", "allclose",
}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
MEET = {"_to_copy", "copy_", "_foreach_copy_", "copy"}
"""Operators whose operands may be on two devices."""
TAKE_SCALARS = {
    "where", "masked_fill", "masked_fill_", "fill_", "lerp", "lerp_", "index_fill", "index_fill_", "clamp", "addcmul",
    "addcdiv", "normal", "bernoulli",
}  # fmt: skip
"""Operators that take 0-dimensional CPU tensors, and are not tagged as pointwise."""

RESIZING = ("arange", "linspace", "logspace", "eye", "randperm")
"""Factories that torch composes of an empty tensor which is then resized; the size of a :class:`Simulated` is fixed."""
KEY = "PrivateUse1"


class DeviceError(RuntimeError):
    """What CUDA would refuse."""


class DeviceModule:
    """What ``torch.cuda`` is to CUDA.

    Attributes:
        generator: that of the device; None is that of the CPU, so that draws on both are those of a CPU alone.
    """

    generator = None
    answers = {
        "is_available": True, "is_initialized": True, "_is_in_bad_fork": False, "current_device": 0, "device_count": 1,
        "synchronize": None, "empty_cache": None, "reset_peak_memory_stats": None, "is_bf16_supported": True,
        "mem_get_info": (1 << 33, 1 << 34), "get_amp_supported_dtype": [torch.bfloat16, torch.float16],
    }  # fmt: skip

    def __getattr__(self, name):
        if name not in self.answers:
            raise AttributeError(name)
        return lambda *_, **__: self.answers[name]

    def device(self, _):
        return contextlib.nullcontext()

    def memory_allocated(self, _=None):
        return allocated()

    max_memory_allocated = memory_reserved = memory_allocated

    def manual_seed_all(self, seed):
        if self.generator is not None:
            self.generator.manual_seed(seed)

    manual_seed = manual_seed_all

    def get_rng_state(self, _=None):
        return (self.generator or torch.default_generator).get_state()

    def set_rng_state(self, state, _=None):
        (self.generator or torch.default_generator).set_state(state)


MODULE = DeviceModule()


class Simulated(torch.Tensor):
    """A tensor on the device; ``values`` are its values on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values):
        made = torch.Tensor._make_wrapper_subclass(
            cls, values.size(), strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype,
            device=torch.device(NAME, 0),
        )  # fmt: skip
        made.values = values
        return made

    def __repr__(self):
        return f"Simulated({self.values!r})"

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copy = Simulated(self.values.clone())
            is_parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(copy, self.requires_grad) if is_parameter else copy
            memo[id(self)].requires_grad_(self.requires_grad)
        return memo[id(self)]

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, other):
        self.values = other.values  # a parameter that is replaced keeps its shape

    def tolist(self):
        LOG["wait: tolist"] += 1
        return self.values.tolist()

    def numpy(self, *_, **__):
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, *args, **(kwargs or {}))


def on_device(device):
    return device is not None and torch.device(device).type == NAME


def allocated():
    """Bytes of the storages of all tensors on the device."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) is Simulated:
            storage = thing.values.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


class Facts(NamedTuple):
    """What decides how an operator is run."""

    name: str
    takes_scalars: bool
    draws: bool
    writes: bool
    reads_counts: bool


@cache
def facts(func):
    name = func.overloadpacket.__name__
    takes_scalars = torch.Tag.pointwise in func.tags or name in TAKE_SCALARS or name.startswith("_foreach_")
    reads_counts = name == "repeat_interleave" and "Tensor" in func._overloadname
    return Facts(
        name, takes_scalars, torch.Tag.nondeterministic_seeded in func.tags, func._schema.is_mutable, reads_counts
    )


def leaves(value):
    """Yield the tensors in nested lists."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from leaves(part)


def change(function, value):
    """Apply a function to the tensors in nested lists."""
    if isinstance(value, torch.Tensor):
        return function(value)
    return type(value)(change(function, part) for part in value) if isinstance(value, list | tuple) else value


def unwrap(tensor):
    return tensor.values if isinstance(tensor, Simulated) else tensor


def wrap(tensor):
    return tensor if isinstance(tensor, Simulated) else Simulated(tensor)


def check(about, args, kwargs):
    """Raise what CUDA would, and count waits; return whether an operand is on the device."""
    name, tensors = about.name, list(leaves([args, *kwargs.values()]))
    here = any(isinstance(tensor, Simulated) for tensor in tensors)
    if kwargs.get("generator") is not None and on_device(kwargs.get("device", NAME if here else None)):
        raise DeviceError(f"{name}: expected a {NAME!r} generator, got that of {kwargs['generator'].device.type!r}")
    there = [tensor for tensor in tensors if not isinstance(tensor, Simulated)] if here else []
    if there and name not in MEET:
        check_operands(about, args, there)
    if here:
        masks = name in INDEXING and any(isinstance(i, Simulated) and i.dtype == torch.bool for i in args[1] or ())
        if name in WAITING or masks or (about.reads_counts and kwargs.get("output_size") is None):
            LOG[f"wait: {name}"] += 1
    return here


def check_operands(about, args, there):
    """Check an operator with operands on the device and on the CPU, ``there``."""
    name = about.name
    if name in INDEXING:
        indexed, indices, values = args[0], args[1] or (), args[2:3]
        if not isinstance(indexed, Simulated):
            raise DeviceError(f"{name}: indices should be on the device of the indexed tensor (cpu)")
        if any(not isinstance(value, Simulated) and value.ndim for value in values):
            raise DeviceError(f"{name}: expected the values on the device of the indexed tensor, got them on the cpu")
        LOG["copy to device"] += sum(isinstance(i, torch.Tensor) and not isinstance(i, Simulated) for i in indices)
    elif any(tensor.ndim for tensor in there) or not about.takes_scalars:
        shapes = [tuple(tensor.shape) for tensor in there]
        raise DeviceError(f"{name}: expected all tensors on one device, found {NAME}:0 and cpu {shapes[:4]}")


def count_copy(target, source, non_blocking):
    """Count a copy between devices."""
    if isinstance(source, Simulated) and not target:
        LOG["wait: copy to the CPU"] += 1
    if target and not isinstance(source, Simulated):
        pinned = getattr(source, "is_pinned_here", False) and non_blocking
        LOG["pinned copy to device" if pinned else "copy to device"] += 1


def run(func, *args, **kwargs):
    """Run an operator with an operand or its result on the device."""
    about = facts(func)
    here = check(about, args, kwargs)
    target = on_device(kwargs["device"]) if kwargs.get("device") is not None else here
    if about.name == "_to_copy":
        count_copy(target, args[0], kwargs.get("non_blocking", False))
    elif about.name == "copy_":
        target = isinstance(args[0], Simulated)
        count_copy(target, args[1], args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    elif about.name == "_fused_sdp_choice":
        return 0
    inner = {key: "cpu" if key == "device" and on_device(value) else value for key, value in kwargs.items()}
    inner.pop("pin_memory", None)
    values, named = change(unwrap, args), {key: change(unwrap, value) for key, value in inner.items()}
    with drawing(target and about.draws):
        found = func(*values, **named)
    if about.writes and here:
        if any(tensor.shape != unwrap(tensor).shape for tensor in leaves(args)):
            raise NotImplementedError(f"{about.name}: the size of a tensor on the device is fixed")
        return None if found is None else kwargs.get("out", args[0])
    return change(wrap, found) if target else found


@contextlib.contextmanager
def drawing(draws):
    """Draw from the generator of the device inside the block."""
    if not draws or MODULE.generator is None:
        yield
        return
    before = torch.default_generator.get_state()
    torch.default_generator.set_state(MODULE.generator.get_state())
    try:
        yield
    finally:
        MODULE.generator.set_state(torch.default_generator.get_state())
        torch.default_generator.set_state(before)


def pin_memory(self, *_):
    """Pinned memory is a copy, from which copies to the device do not wait."""
    pinned = self.clone()
    pinned.is_pinned_here = True
    return pinned


def register():
    """Register the device; once per process."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=MODULE)
    library, factories = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    library.fallback(run, KEY)
    for name in RESIZING:
        packet = getattr(torch.ops.aten, name)
        for overload in packet.overloads():
            if "out" not in overload:
                func = getattr(packet, overload)
                factories.impl(func._schema.name + f".{overload}" * (overload != "default"), partial(run, func), KEY)
    return library, factories


@contextlib.contextmanager
def usable():
    """Let tensors be made on the device inside the block, and pin memory without a GPU."""
    before, torch.Tensor.pin_memory = torch.Tensor.pin_memory, pin_memory
    torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor(..., device=) copies a CPU tensor
    try:
        yield
    finally:
        torch.Tensor.pin_memory = before
        torch._C._set_only_lift_cpu_tensors(False)


LIBRARIES = register()
DEVICE = torch.device(NAME, 0)
