"""The CUDA library's C interface (cuda/include/halfbyte/cuda/api.h) as ctypes, and its build: an
object a source, and PTX for compute_80 and compute_120, which come from different code generators.
"""

import ctypes as C
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[3]
CUDA = ROOT / "cuda"
ARCHS = ("compute_80", "compute_120")
FILE_FLAGS = {"adamw8_update_sm80.cu": ["-fmad=false"]}  # as in cuda/CMakeLists.txt
INCLUDES = [f"-I{CUDA}", f"-I{CUDA / 'include'}", f"-I{ROOT / 'cpp/include'}"]

sys.path.insert(0, str(ROOT / "tests"))

from ptx_interpreter import FakeRuntime  # noqa: E402
from ptx_interpreter.nvcc import STANDARD, compile_source  # noqa: E402
from ptx_interpreter.nvcc import Compiled as Built  # noqa: E402

FLAGS = [*STANDARD, "-O3", "-Xcompiler=-Wall,-fvisibility=hidden"]

# --- build ----------------------------------------------------------------------------------------


def build_all() -> list[Built]:
    """Every source of the library."""

    def build(source: Path) -> Built:
        flags = FLAGS + FILE_FLAGS.get(source.name, [])
        return compile_source(source, ARCHS, [*flags, *INCLUDES])

    sources = sorted([*CUDA.glob("*.cu"), *CUDA.glob("*/*.cu")])
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(build, sources))


# --- the structs of api.h -------------------------------------------------------------------------

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CODEBOOKS = {"nf4": 0, "fp4": 1, "int4": 2}
STATES = {"float32": 0, "moments": 1, "ratio": 2}
AUTO, MANAGED, PINNED = range(3)


def _struct(title: str, **fields) -> type[C.Structure]:
    return type(title, (C.Structure,), {"_fields_": list(fields.items())})


P, I32, I64, F32, F64 = C.c_void_p, C.c_int, C.c_int64, C.c_float, C.c_double

Where = _struct("Where", device=I32, stream=P)
Operand = _struct("Operand", data=P, dtype=I32)
Nf4Bits = _struct(
    "Nf4Bits", packed=P, absmax=P, absmax_codes=P, nested_absmax=P, nested_map=P, offset=P,
    levels=P, count=I64, block_shift=I32,
)  # fmt: skip
Weight = _struct("Weight", bits=Nf4Bits, codebook=I32)
QuantizeLaunch = _struct(
    "QuantizeLaunch", weight=Operand, count=I64, block_size=I32, codebook=I32, packed=P, absmax=P,
    bad_index=C.POINTER(I64),
)  # fmt: skip
DoubleQuantizeLaunch = _struct(
    "DoubleQuantizeLaunch", absmax=P, blocks=I64, offset=P, codes=P, nested_absmax=P
)
DequantizeLaunch = _struct("DequantizeLaunch", weight=Weight, out=Operand)
ForwardLaunch = _struct(
    "ForwardLaunch", M=I64, N=I64, K=I64, R=I64, x=Operand, weight=Weight, bias=Operand,
    lora_a=Operand, lora_b=Operand, scaling=F32, seed=P, dropout_threshold=C.c_uint32,
    dropout_scale=F32, y=Operand, t=P, workspace=P,
)  # fmt: skip
BackwardLaunch = _struct(
    "BackwardLaunch", M=I64, N=I64, K=I64, R=I64, dy=Operand, x=Operand, weight=Weight,
    lora_a=Operand, lora_b=Operand, t=P, scaling=F32, seed=P, dropout_threshold=C.c_uint32,
    dropout_scale=F32, dx=Operand, d_lora_a=Operand, d_lora_b=Operand, d_bias=Operand, workspace=P,
)  # fmt: skip
AdamW8Tensor = _struct(
    "AdamW8Tensor", count=I64, param=P, grad=P, param_dtype=I32, grad_dtype=I32, state=I32,
    exp_avg=P, exp_avg_sq=P, exp_avg_absmax=P, exp_avg_sq_absmax=P, step=P, group=I64,
)  # fmt: skip
AdamW8Group = _struct(
    "AdamW8Group", lr=F64, beta1=F64, beta2=F64, eps=F64, weight_decay=F64, maximize=C.c_bool
)
AdamW8Launch = _struct(
    "AdamW8Launch", tensors=C.POINTER(AdamW8Tensor), tensor_count=I64,
    groups=C.POINTER(AdamW8Group), group_count=I64, bad=P,
)  # fmt: skip
PageRange = _struct("PageRange", arena=P, begin=I64, end=I64, first_tensor=I64, tensor_count=I64)
PagedAdamW8Launch = _struct(
    "PagedAdamW8Launch", step=AdamW8Launch, pages=C.POINTER(PageRange), page_count=I64,
    look_ahead=I64, evict=C.c_bool,
)  # fmt: skip
VariantRow = _struct("VariantRow", name=C.c_char_p, why_not=C.c_char_p, chosen=C.c_bool)


def _sentence(*arguments):
    return C.CFUNCTYPE(C.c_char_p, *arguments)


def _launch(struct):
    return _sentence(C.POINTER(struct), Where)


Api = _struct(
    "Api",
    version=I32,
    why_not=_sentence(),
    device_count=C.CFUNCTYPE(I32),
    device_description=_sentence(I32),
    quantize_4bit=_launch(QuantizeLaunch),
    double_quantize=_launch(DoubleQuantizeLaunch),
    dequantize_4bit=_launch(DequantizeLaunch),
    lora_linear_forward_workspace=C.CFUNCTYPE(I64, C.POINTER(ForwardLaunch), Where),
    lora_linear_backward_workspace=C.CFUNCTYPE(I64, C.POINTER(BackwardLaunch), Where),
    lora_linear_forward=_launch(ForwardLaunch),
    lora_linear_backward=_launch(BackwardLaunch),
    variant=C.CFUNCTYPE(C.c_bool, C.c_char_p, I32, I32, C.POINTER(VariantRow)),
    adamw8_step=_launch(AdamW8Launch),
    adamw8_paged_step=_launch(PagedAdamW8Launch),
    arena_create=_sentence(I64, I32, I32, C.POINTER(P)),
    arena_destroy=C.CFUNCTYPE(None, P),
    arena_address=C.CFUNCTYPE(P, P),
    arena_kind=C.CFUNCTYPE(I32, P),
    arena_prefetch=_sentence(P, I64, I64, C.c_bool, Where),
)


def load_api(library: C.CDLL) -> Api:
    entry = library.halfbyte_cuda_api
    entry.restype, entry.argtypes = C.POINTER(Api), [I32]
    assert not entry(0), "a table of another version"
    return entry(1).contents


# --- where the tests run --------------------------------------------------------------------------


class Interpreted:
    """The library's own host code on the fake runtime; launches run in the PTX interpreter.

    Torch CPU tensors are device memory once `put`.
    """

    description = "PTX executed by an interpreter; not run on a GPU"

    def __init__(self, built: list[Built], arch: str, library: Path, checks: bool = True):
        self.arch = arch
        texts = [each.ptx[arch] for each in built if ".entry" in each.ptx[arch].read_text()]
        self.runtime = FakeRuntime(library=library, ptx=texts, checks=checks)
        self.api = load_api(self.runtime.library)
        self._kept: dict[int, torch.Tensor] = {}

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device, at the same alignment; its neighbours are out of bounds."""
        known = self.runtime.memory.registry.covers(*_range(tensor))
        if tensor.numel() and not known:
            self.runtime.register(tensor)
            self._kept[tensor.data_ptr()] = tensor
        return tensor

    def forget(self) -> None:
        for tensor in self._kept.values():
            self.runtime.unregister(tensor)
        self._kept.clear()

    def call(self, function: str, launch, device: int = 0, stream: int | None = None) -> None:
        """One of the table's launches; raises its sentence, and any fault in a kernel."""
        sentence = getattr(self.api, function)(C.byref(launch), Where(device, stream)).decode()
        self.runtime.check()
        if sentence:
            raise RuntimeError(sentence)

    def wait(self) -> None:
        pass


class Card:
    """The built library on a GPU."""

    arch = "card"

    def __init__(self, library: Path):
        self.api = load_api(C.CDLL(str(library)))
        self.description = f"run on {self.api.device_description(0).decode()}"

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.numel():
            return tensor.cuda()
        offset = tensor.data_ptr() % 16 // tensor.element_size()
        room = torch.empty(tensor.numel() + offset, dtype=tensor.dtype, device="cuda")
        room[offset:].copy_(tensor.flatten())
        return room[offset:].view(tensor.shape)

    def forget(self) -> None:
        torch.cuda.synchronize()

    def call(self, function: str, launch, device: int = 0, stream: int | None = None) -> None:
        here = torch.cuda.current_stream().cuda_stream
        where = Where(device, here if stream is None else stream)
        sentence = getattr(self.api, function)(C.byref(launch), where).decode()
        if sentence:
            raise RuntimeError(sentence)

    def wait(self) -> None:
        torch.cuda.synchronize()


def _range(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.numel() * tensor.element_size()


def address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def operand(tensor: torch.Tensor | None) -> Operand:
    return Operand() if tensor is None else Operand(address(tensor), DTYPES[tensor.dtype])
