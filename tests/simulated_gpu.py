"""Run a script or command on a GPU that is simulated on the CPU, with the values of a CPU and the rules of a GPU.

    python tests/simulated_gpu.py run_captioning.py --dataset_name phantoms ...
    python tests/simulated_gpu.py -m captioning caption MODEL IMAGES --device simulated

As on a GPU, an operation on tensors of both devices fails, and so does `numpy()`. The last line of standard error
counts what the CPU would wait for. It shows nothing of speed, memory, streams or graphs, nor of autocast, which has no
rules for such a device. `--without_float64`, as the first word, plays a GPU of Apple's.

The device is PyTorch's `PrivateUse1`, whose tensors wrap those of the CPU. Read in torch 2.13:
`torch/utils/backend_registration.py`, and its test `test_privateuseone_python_backend.py`.
"""

import os
import runpy
import sys
from collections import Counter

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


NAME = "simulated"
READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2")  # need a value, so the CPU waits
INDEXING = ("index", "index_put", "index_put_")  # indices may be on the CPU; a mask is counted first
COPIES = ("_to_copy", "copy_")
waits: Counter[str] = Counter()
has_float64 = True


class SimulatedTensor(torch.Tensor):
    """A tensor on the simulated GPU; its values lie in `on_cpu`."""

    @staticmethod
    def __new__(cls, on_cpu: torch.Tensor):
        described = {"dtype": on_cpu.dtype, "strides": on_cpu.stride(), "storage_offset": on_cpu.storage_offset()}
        self = torch.Tensor._make_wrapper_subclass(cls, on_cpu.size(), device=torch.device(NAME, 0), **described)
        self.on_cpu = on_cpu
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})

    def __repr__(self):
        return f"SimulatedTensor({self.on_cpu})"

    def tolist(self):
        waits["tolist"] += 1
        return self.on_cpu.tolist()

    def storage(self):  # by which weights that are shared are found before they are saved
        return self.on_cpu.storage()

    def untyped_storage(self):
        return self.on_cpu.untyped_storage()

    def numpy(self, *args, **kwargs):
        raise TypeError(f"can't convert {self.device} tensor to numpy; use Tensor.cpu() first")


class OnSimulatedGpu(TorchDispatchMode):
    """Makes new tensors on the simulated GPU where a call names it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def compute(func, args, kwargs):
    """Do an operation on the CPU, and return its results on the device that a GPU would have them on."""
    name = func.overloadpacket.__name__
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    simulated = [tensor for tensor in tensors if isinstance(tensor, SimulatedTensor)]
    on_gpu = bool(simulated)
    if name in COPIES:
        on_gpu = isinstance(args[0], SimulatedTensor)
    elif on_gpu and name not in INDEXING and any(x.dim() for x in tensors if not isinstance(x, SimulatedTensor)):
        found = ", ".join(f"{list(tensor.shape)} on {tensor.device}" for tensor in tensors)
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, found {found}")
    if kwargs.get("device") is not None:
        on_gpu = torch.device(kwargs["device"]).type == NAME
        kwargs = kwargs | {"device": torch.device("cpu")}
    indices = args[1] if name in INDEXING else ()
    by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
    between_devices = (
        name in COPIES and len({on_gpu, *(isinstance(tensor, SimulatedTensor) for tensor in tensors)}) == 2
    )
    if between_devices or (simulated and (by_mask or name in READS)):
        waits[name] += 1
    found = func(*tree_map(values_of, args), **tree_map(values_of, kwargs))
    given = {id(tensor.on_cpu): tensor for tensor in simulated}  # what is changed in place is returned itself

    def placed(result):
        if not isinstance(result, torch.Tensor) or not (on_gpu or id(result) in given):
            return result
        if on_gpu and result.dtype == torch.float64 and not has_float64:
            raise TypeError(f"{name}: cannot convert a {NAME} tensor to float64")
        return given[id(result)] if id(result) in given else SimulatedTensor(result)

    return tree_map(placed, found)


def values_of(leaf):
    """Return a simulated tensor's values on the CPU, anything else as it is."""
    return leaf.on_cpu if isinstance(leaf, SimulatedTensor) else leaf


class Module(backend_registration._DummyBackendModule):
    """What `torch.simulated` answers."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


def register() -> torch.library.Library:
    """Make the device known to PyTorch, for the rest of the process; the result must be kept."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    kernels = torch.library.Library("aten", "IMPL")  # what C++ calls without asking Python's modes

    def empty_strided(size, stride, *, dtype=None, **kwargs):
        return SimulatedTensor(torch.empty_strided(size, stride, dtype=dtype))

    def copy_from(source, target, non_blocking=False):
        values_of(target).copy_(values_of(source))
        return target

    kernels.impl("empty_strided", empty_strided, "PrivateUse1")
    kernels.impl("_copy_from", copy_from, "PrivateUse1")
    kernels.impl("_local_scalar_dense", lambda tensor: tensor.on_cpu.item(), "PrivateUse1")
    return kernels


def main(words: list[str]) -> None:
    global has_float64
    os.environ["ACCELERATE_TORCH_DEVICE"] = f"{NAME}:0"  # where the Trainer trains
    kernels = register()
    torch.inference_mode = torch.no_grad  # whose tensors cannot wrap others
    torch.__future__.set_swap_module_params_on_conversion(True)  # else two modules do not share a weight any more
    save = torch.save
    torch.save = lambda found, *args, **kwargs: save(tree_map(values_of, found), *args, **kwargs)
    from captioning.models import captioner
    from captioning.models.fast_blip import decoder

    if words[0] == "--without_float64":
        words, has_float64, captioner.WITHOUT_FLOAT64 = words[1:], False, {NAME}
    decoder.FIXED_SHAPE_ON, decoder.GRAPHS_ON = {NAME}, set()
    as_module = words[0] == "-m"
    sys.argv = words[as_module:]
    status = 0
    try:
        with OnSimulatedGpu():
            (runpy.run_module if as_module else runpy.run_path)(words[as_module], run_name="__main__")
    except SystemExit as end:
        status = end.code
    print(f"waits: {dict(waits)}", file=sys.stderr, flush=True)
    del kernels
    os._exit(status or 0)  # the autograd threads of such a device do not end


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    main(sys.argv[1:])
