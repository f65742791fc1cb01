"""A transformers model with 4-bit layers, its tensors brought one at a time.

    model = load_model("my-model")             # dense safetensors or GGUF: packed as they are read
    model = load_model("my-model-nf4")         # a packed folder: mapped, nothing is copied

    skeleton    the model on the meta device, its linear layers replaced as `NF4Config` says (for a
                packed folder: where it has packed weights)
    tensors     each read in pieces by one of a few threads, packed, put in its place
    the rest    tied weights tied, buffers that no checkpoint holds computed

Peak memory = the packed model + what the threads hold (a piece of 1 MB and its conversions each).
A mapped model's weights are the file's own pages: shared between processes, dropped by the system
when memory is short, read again when they are used.

A model whose checkpoint transformers renames or merges while it loads (fused experts, tensors kept
in float32) is left to `from_pretrained` with the same `NF4Config`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from halfbyte._native import _C
from halfbyte.integrations.gguf_models import GgufModel
from halfbyte.integrations.layer_streaming import stream_layers
from halfbyte.integrations.model_skeleton import finish, plan, skeleton, why_transformers
from halfbyte.integrations.model_sources import FolderModel, open_model
from halfbyte.integrations.packing import Packer, check_finite
from halfbyte.integrations.safetensors_files import ModelFileError
from halfbyte.integrations.transformers import NF4Config
from halfbyte.nf4_weight import NF4Weight, quantize_4bit
from halfbyte.nn import NF4Linear

__all__ = ["load_dense", "load_model", "stream_layers"]

THREADS = 2
Progress = Callable[[int, int, str], None]


def load_model(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    config: NF4Config | None = None,
    mapped: bool = True,
    verify: bool = False,
    threads: int = THREADS,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """A causal language model with `NF4Linear` layers, in evaluation mode, on the CPU.

    source    a Hugging Face folder (dense, or packed by halfbyte or bitsandbytes) or a GGUF file
    dtype     of what stays dense; None: the checkpoint's (a GGUF file: bfloat16)
    config    how linear layers are packed; a packed folder has its own, and refuses another
    mapped    a packed folder's tensors are pages of its files instead of copies
    verify    check every stored checksum first; ModelFileError names the first tensor that fails
    progress  is called with (bytes done, bytes in all, name) after each tensor

    Raises ModelFileError, which names the file and the tensor, for whatever does not fit: absent
    and left-over tensors, shapes, values that are not finite (not looked for in mapped dense
    tensors: `verify` does that), checksums.
    """
    opened = open_model(source)
    packed = isinstance(opened, FolderModel) and bool(opened.packed)
    if verify:
        check_sums(opened)
    if packed and config is not None:
        raise ValueError(f"config: expected None for {source}, which is packed already")
    dtype = dtype or default_dtype(opened)
    model, quantizer = skeleton(opened, dtype, config)
    if reason := why_transformers(model, opened, dtype):
        return _from_pretrained(opened, dtype, config, reason)
    names = plan(model, opened)
    if packed and mapped:
        opened.ask_for_statistics()
    run_all(names, _Mover(model, opened, mapped), opened.nbytes, threads, progress)
    finish(model, quantizer, opened)
    return model


def load_dense(source: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """`load_model` of a dense folder or a GGUF file with all its layers left dense."""
    model = load_model(source, dtype=dtype, config=NF4Config(skip_modules=[".+"]))
    model.hf_quantizer.remove_quantization_config(model)
    return model


def default_dtype(opened: FolderModel | GgufModel) -> torch.dtype:
    """The checkpoint's dtype; bfloat16 for a GGUF file."""
    if isinstance(opened, GgufModel):
        return torch.bfloat16
    found = opened.config.dtype
    if isinstance(found, torch.dtype):
        return found
    floats = (e.dtype for e in opened.folder.entries.values() if e.dtype.is_floating_point)
    return next(floats, torch.float32)


def check_sums(opened: FolderModel | GgufModel) -> None:
    """ModelFileError for the first tensor whose checksum is absent or wrong."""
    if isinstance(opened, GgufModel):
        raise ModelFileError(f"{opened.path}: a GGUF file has no checksums to verify")
    for name, entry in opened.folder.entries.items():
        if wrong := opened.folder.check(name):
            raise ModelFileError(f"{entry}: {wrong}")


def _from_pretrained(
    opened: FolderModel | GgufModel, dtype: torch.dtype, config: NF4Config | None, reason: str
) -> PreTrainedModel:
    if isinstance(opened, GgufModel):
        raise ModelFileError(f"{opened.path}: cannot be streamed: {reason}")
    logging.getLogger(__name__).info("%s: read by transformers: %s", opened.path, reason)
    settings = {} if opened.packed else {"quantization_config": config or NF4Config()}
    return AutoModelForCausalLM.from_pretrained(
        opened.path, dtype=dtype, local_files_only=True, **settings
    )


def dense_tensor(opened: FolderModel | GgufModel, name: str, dtype: torch.dtype) -> torch.Tensor:
    """The tensor `name` in `dtype`, read in pieces; ModelFileError for a NaN or an infinity."""
    out = torch.empty(opened.shape(name), dtype=dtype)
    _C.advise_huge_pages(out)
    flat, done = out.view(-1), 0
    for piece in opened.pieces(name):
        check_finite(piece, f"{opened.path}: {opened.placed[name]}", done)
        flat[done : done + len(piece)] = piece
        done += len(piece)
    return out


def pack_tensor(
    opened: FolderModel | GgufModel,
    name: str,
    dtype: torch.dtype,
    settings: NF4Config | NF4Linear,
    transposed: bool = False,
) -> NF4Weight:
    """The tensor `name`, rounded to `dtype`, packed; block size and code book as in `settings`."""
    double_quant = (
        settings.double_quant
        if isinstance(settings, NF4Config)
        else settings.nested_absmax is not None
    )
    where = f"{opened.path}: {opened.placed[name]}"
    if transposed:  # GPT-2's layout: rows of the packed weight are columns of the stored one
        values = dense_tensor(opened, name, dtype).T.contiguous()
        return quantize_4bit(values, settings.codebook, settings.block_size, double_quant)
    packer = Packer(
        where, opened.shape(name), dtype, settings.block_size, double_quant, settings.codebook
    )
    for piece in opened.pieces(name):
        packer.feed(piece)
    return packer.finish()


class _Mover:
    """Brings one tensor into the model."""

    def __init__(self, model: nn.Module, opened: FolderModel | GgufModel, mapped: bool) -> None:
        self.model, self.opened, self.mapped = model, opened, mapped

    def __call__(self, name: str) -> None:
        path, _, leaf = name.rpartition(".")
        module, opened = self.model.get_submodule(path), self.opened
        if isinstance(module, NF4Linear) and leaf == "weight":
            module._set_weight(self._weight(name, module))
            return
        old = module._parameters.get(leaf)
        target = module._buffers[leaf] if old is None else old
        folder = isinstance(opened, FolderModel)
        if self.mapped and folder and opened.packed and opened.dtype(name) == target.dtype:
            tensor = opened.folder.map(opened.placed[name])
        else:
            tensor = dense_tensor(opened, name, target.dtype)
        if old is None:
            module._buffers[leaf] = tensor
        else:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=old.requires_grad)

    def _weight(self, name: str, module: NF4Linear) -> NF4Weight:
        transposed = module.source_cls is Conv1D
        if not isinstance(self.opened, FolderModel) or not self.opened.is_packed(name):
            return pack_tensor(self.opened, name, module.weight_dtype, module, transposed)
        weight = self.opened.packed_weight(name, self.mapped)
        if weight.shape != (module.out_features, module.in_features):
            raise ModelFileError(
                f"{self.opened.path}: {self.opened.placed[name]}: expected a packed weight of "
                f"[{module.out_features}, {module.in_features}], got {list(weight.shape)}"
            )
        return weight


def run_all(
    names: list[str],
    work: Callable[[str], None],
    size: Callable[[str], int],
    threads: int,
    progress: Progress | None = None,
) -> None:
    """`work` on every name in a few threads; the first error ends it and is raised."""
    if threads < 1:
        raise ValueError(f"threads: expected at least 1, got {threads}")
    total, done = sum(map(size, names)), 0
    with ThreadPoolExecutor(threads) as pool:
        pending = {pool.submit(work, name): name for name in names}
        try:
            for future in as_completed(pending):
                future.result()
                done += size(pending[future])
                if progress is not None:
                    progress(done, total, pending[future])
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
