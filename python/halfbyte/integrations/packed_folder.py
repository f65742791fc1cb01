"""A packed folder written from a model, tensor by tensor: safetensors in bitsandbytes' layout with
a checksum for every tensor, configuration, tokenizer.

The place of every byte is known before the first tensor is read: a packed weight's entries have
fixed sizes, once the JSON among them is filled up with blanks. So a few threads write to the files
at once, in any order, and hold no more than what they work on: a piece of a dense tensor, or a
packed weight.

Entries of a weight lie together, first the float32 ones, then bytes, and take a multiple of 64
bytes: float32 stays aligned, and the codes of a layer are one run of pages.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from halfbyte import checkpoint
from halfbyte.integrations.gguf_models import GgufModel
from halfbyte.integrations.model_skeleton import (
    PackedAsStored,
    plan,
    skeleton,
    why_transformers,
)
from halfbyte.integrations.model_sources import FolderModel, open_model
from halfbyte.integrations.packing import check_finite
from halfbyte.integrations.safetensors_files import (
    CHECKSUM,
    INDEX,
    NAMES,
    ModelFileError,
    checksum,
)
from halfbyte.integrations.streaming import (
    THREADS,
    Progress,
    default_dtype,
    pack_tensor,
    run_all,
)
from halfbyte.integrations.transformers import METHOD, NF4Config
from halfbyte.nf4_weight import NF4Weight
from halfbyte.nn import NF4Linear

SHARD_BYTES = 5 * 10**9
_ALIGNMENT = 64
_LONGEST_NUMBER = 24  # characters of a float in JSON: -1.2345678901234567e-308


@dataclass
class Output:
    """One tensor of a file: bytes [start, start + nbytes) of its data."""

    key: str
    dtype: torch.dtype
    shape: torch.Size
    nbytes: int
    start: int = 0
    digest: str = "0" * 64


@dataclass
class Item:
    """One tensor of the model: what is stored of it; `weight` is a template, if it is packed."""

    name: str
    outputs: list[Output]
    weight: NF4Weight | None = None

    @property
    def nbytes(self) -> int:
        return sum(output.nbytes for output in self.outputs)


@dataclass
class Shard:
    """One file: its items and the room for its header."""

    items: list[Item] = field(default_factory=list)
    path: Path = Path()
    header_bytes: int = 0
    descriptor: int = -1

    @property
    def nbytes(self) -> int:
        return sum(item.nbytes for item in self.items)

    def header(self) -> bytes:
        """The header with the digests that are there by now; its length never changes."""
        outputs = [output for item in self.items for output in item.outputs]
        metadata = {"format": "pt"} | {CHECKSUM + o.key: o.digest for o in outputs}
        fields = {
            o.key: {
                "dtype": NAMES[o.dtype],
                "shape": list(o.shape),
                "data_offsets": [o.start, o.start + o.nbytes],
            }
            for o in outputs
        }
        text = json.dumps({"__metadata__": metadata} | fields, ensure_ascii=False).encode()
        text += b" " * (-(8 + len(text)) % _ALIGNMENT)
        return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True)
class Written:
    """What was written: tensors, packed weights among them, bytes before and after."""

    tensors: int
    packed: int
    bytes_before: int
    bytes_after: int


def write_packed_folder(
    source: str | Path,
    folder: Path,
    *,
    config: NF4Config | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    threads: int = THREADS,
    progress: Progress | None = None,
) -> Written:
    """Writes the model at `source`, its linear layers packed, into the existing `folder`.

    `source`, `config`, `dtype` and `progress` are those of `load_model`; a source that is packed
    already is copied. The caller sees to it that a folder half written is not taken for a whole one
    (`halfbyte quantize` writes aside, syncs and renames). Raises ModelFileError, also where the
    disk has too little room: then before any tensor is read.
    """
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes: expected at least 1, got {shard_bytes}")
    opened = open_model(source)
    packed = isinstance(opened, FolderModel) and bool(opened.packed)
    if packed and config is not None:
        raise ValueError(f"config: expected None for {source}, which is packed already")
    dtype = dtype or default_dtype(opened)
    model, quantizer = skeleton(opened, dtype, config)
    if reason := why_transformers(model, opened, dtype):
        raise ModelFileError(
            f"{opened.path}: cannot be packed tensor by tensor: {reason}; load it with "
            "from_pretrained(..., quantization_config=halfbyte.NF4Config()) and save_pretrained"
        )
    names = plan(model, opened)
    items = [_item(opened, model, name) for name in names]
    shards = _shards(items, shard_bytes, folder)
    _make_room(shards, folder)
    places = {item.name: (item, shard) for shard in shards for item in shard.items}
    try:
        run_all(
            names,
            lambda name: _write(opened, model, *places[name]),
            opened.nbytes,
            threads,
            progress,
        )
        for shard in shards:
            os.pwrite(shard.descriptor, shard.header(), 0)
    finally:
        for shard in shards:
            os.close(shard.descriptor)
    _write_index(shards, folder)
    _write_config(opened, model, quantizer, dtype, folder)
    return Written(
        tensors=len(items),
        packed=sum(item.weight is not None for item in items),
        bytes_before=sum(map(opened.nbytes, names)),
        bytes_after=sum(shard.nbytes for shard in shards),
    )


# --- layout ---------------------------------------------------------------------------------------


def _item(opened: FolderModel | GgufModel, model: torch.nn.Module, name: str) -> Item:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if not (isinstance(module, NF4Linear) and leaf == "weight"):
        target = module._parameters.get(leaf)
        target = module._buffers[leaf] if target is None else target
        return Item(name, [Output(name, target.dtype, target.shape, target.nbytes)])
    if isinstance(opened, FolderModel) and opened.is_packed(name):
        weight = opened.packed_weight(name, mapped=True)
        if weight.shape != (module.out_features, module.in_features):
            raise ModelFileError(
                f"{opened.path}: {opened.placed[name]}: expected a packed weight of "
                f"[{module.out_features}, {module.in_features}], got {list(weight.shape)}"
            )
    else:
        weight = checkpoint.empty_weight(
            torch.Size((module.out_features, module.in_features)),
            module.weight_dtype,
            module.block_size,
            module.nested_absmax is not None,
            module.codebook,
        )
        if weight.double_quant:
            weight = dataclasses.replace(weight, offset=torch.zeros(1))
    return Item(name, _outputs(weight, name), weight)


def _outputs(weight: NF4Weight, name: str) -> list[Output]:
    """A packed weight's entries in file order; the JSON, last, takes what fills a whole line."""
    entries = checkpoint.to_entries(weight, name)
    outputs = [Output(key, t.dtype, t.shape, t.nbytes) for key, t in entries.items()]
    outputs.sort(key=lambda output: (-output.dtype.itemsize, ".quant_state." in output.key))
    state = outputs[-1]
    longest = sum(output.nbytes for output in outputs) + _LONGEST_NUMBER
    state.nbytes += _LONGEST_NUMBER + -longest % _ALIGNMENT
    state.shape = torch.Size([state.nbytes])
    return outputs


def _shards(items: list[Item], shard_bytes: int, folder: Path) -> list[Shard]:
    shards = [Shard()]
    for item in items:
        if shards[-1].items and shards[-1].nbytes + item.nbytes > shard_bytes:
            shards.append(Shard())
        shards[-1].items.append(item)
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}" if len(shards) > 1 else "model"
        shard.path = folder / f"{name}.safetensors"
        # Odd sizes last, wide types first: every tensor stays aligned.
        shard.items.sort(key=lambda i: (i.nbytes % _ALIGNMENT != 0, -i.outputs[0].dtype.itemsize))
        start = 0
        for output in (output for item in shard.items for output in item.outputs):
            output.start = start
            start += output.nbytes
        shard.header_bytes = len(shard.header())
    return shards


def _make_room(shards: list[Shard], folder: Path) -> None:
    """Opens the files at their full size; ModelFileError where the disk has no room for them."""
    needed = sum(shard.header_bytes + shard.nbytes for shard in shards)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ModelFileError(f"{folder}: {needed:,} bytes are needed there, {free:,} are free")
    for shard in shards:
        shard.descriptor = os.open(shard.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            _allocate(shard.descriptor, shard.header_bytes + shard.nbytes)
        except OSError as error:
            for opened in shards:
                if opened.descriptor >= 0:
                    os.close(opened.descriptor)
            raise ModelFileError(
                f"{shard.path}: {needed:,} bytes are needed there: {error.strerror}"
            ) from None


def _allocate(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)


# --- data -----------------------------------------------------------------------------------------


def _write(
    opened: FolderModel | GgufModel, model: torch.nn.Module, item: Item, shard: Shard
) -> None:
    if item.weight is None:
        _write_dense(opened, item, shard)
        return
    if isinstance(opened, FolderModel) and opened.is_packed(item.name):
        weight = opened.packed_weight(item.name, mapped=False)
    else:
        module = model.get_submodule(item.name.removesuffix(".weight"))
        weight = pack_tensor(
            opened, item.name, module.weight_dtype, module, module.source_cls is Conv1D
        )
    entries = checkpoint.to_entries(weight, item.name)
    for output in item.outputs:
        data = memoryview(entries[output.key].contiguous().view(-1).view(torch.uint8).numpy())
        blanks = b" " * (output.nbytes - len(data))  # after the JSON; everything else fits
        _put(shard, output, [data, memoryview(blanks)])


def _write_dense(opened: FolderModel | GgufModel, item: Item, shard: Shard) -> None:
    (output,) = item.outputs
    done = 0

    def data():
        nonlocal done
        for piece in opened.pieces(item.name):
            check_finite(piece, f"{opened.path}: {opened.placed[item.name]}", done)
            done += len(piece)
            yield memoryview(piece.to(output.dtype).view(torch.uint8).numpy())

    _put(shard, output, data())


def _put(shard: Shard, output: Output, pieces: Any) -> None:
    sha, done = checksum(output.key, output.dtype, output.shape), 0
    for piece in pieces:
        sha.update(piece)
        place = shard.header_bytes + output.start + done
        done += len(piece)
        while len(piece):
            count = os.pwrite(shard.descriptor, piece, place)
            piece, place = piece[count:], place + count
    assert done == output.nbytes, (output.key, done, output.nbytes)
    output.digest = sha.hexdigest()


def _write_index(shards: list[Shard], folder: Path) -> None:
    if len(shards) == 1:
        return
    placed = {o.key: s.path.name for s in shards for i in s.items for o in i.outputs}
    total = {"total_size": sum(shard.nbytes for shard in shards)}
    text = json.dumps({"metadata": total, "weight_map": placed}, indent=2, sort_keys=True)
    (folder / INDEX).write_text(text + "\n", encoding="utf-8")


def _write_config(
    opened: FolderModel | GgufModel, model: Any, quantizer: Any, dtype: torch.dtype, folder: Path
) -> None:
    settings = quantizer.quantization_config.to_dict()
    dense = quantizer.dense_against_config if isinstance(quantizer, PackedAsStored) else None
    if dense is not None:
        # Not what halfbyte's rule would pack: bitsandbytes' list says which layers are dense.
        settings.pop(METHOD, None)
        settings["llm_int8_skip_modules"] = dense
    model.config.quantization_config = settings
    model.config.architectures = [type(model).__name__]
    model.config.dtype = dtype
    model.config.save_pretrained(folder)
    opened.save_tokenizer(folder)
    if isinstance(opened, GgufModel):
        model.generation_config.save_pretrained(folder)
    elif (stored := opened.path / "generation_config.json").is_file():
        shutil.copyfile(stored, folder / stored.name)
