"""A packed folder checked: every stored tensor against its checksum, and what holds them together.

`verify_folder(path)` reads every byte. Checksums show changed bytes and a changed header of a
tensor; beyond them the index must name what is there, and statistics must fit their packed weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from halfbyte import checkpoint
from halfbyte.integrations.safetensors_files import (
    CHECKSUM,
    ModelFileError,
    SafetensorsFile,
    SafetensorsFolder,
)
from halfbyte.integrations.streaming import THREADS, Progress, run_all


@dataclass(frozen=True)
class Damage:
    """Something that is wrong in a folder; `tensor` is None where it is a file or the folder."""

    file: str
    tensor: str | None
    reason: str


@dataclass(frozen=True)
class Verified:
    """What `verify_folder` found: tensors checked, bytes read, everything that is wrong."""

    tensors: int
    nbytes: int
    damage: list[Damage]


def verify_folder(
    path: Path, *, threads: int = THREADS, progress: Progress | None = None
) -> Verified:
    """Checks every stored tensor against its checksum, and what its packed weights' headers say.

    Raises ModelFileError where there is nothing to check: no safetensors, or none with checksums.
    """
    files, damage = {}, []
    for file in sorted(path.glob("*.safetensors")):
        try:
            files[file.name] = SafetensorsFile(file)
        except ModelFileError as error:
            damage.append(Damage(file.name, None, str(error)))
    entries = {
        f"{name}: {entry.name}": entry
        for name, file in files.items()
        for entry in file.entries.values()
    }
    with_checksums = any(key.startswith(CHECKSUM) for f in files.values() for key in f.metadata)
    if not with_checksums and not damage:
        what = "checksums in it" if files else "*.safetensors in it"
        raise ModelFileError(f"{path}: expected {what}, got none")

    def check(key: str) -> None:
        entry = entries[key]
        stored = entry.file.stored_digest(entry)
        try:
            found = entry.file.digest(entry)
        except ModelFileError as error:
            damage.append(Damage(entry.file.path.name, entry.name, str(error)))
            return
        if stored != found:
            reason = "has no checksum" if stored is None else "its checksum does not fit its bytes"
            damage.append(Damage(entry.file.path.name, entry.name, reason))

    run_all(list(entries), check, lambda key: entries[key].nbytes, threads, progress)
    for file in files.values():
        gone = {k.removeprefix(CHECKSUM) for k in file.metadata if k.startswith(CHECKSUM)}
        for name in sorted(gone - set(file.entries)):
            damage.append(Damage(file.path.name, name, "has a checksum, but is not there"))
    if not damage:
        damage += _structure(path)
    return Verified(
        tensors=len(entries),
        nbytes=sum(entry.nbytes for entry in entries.values()),
        damage=sorted(damage, key=lambda d: (d.file, d.tensor or "")),
    )


def _structure(path: Path) -> list[Damage]:
    """What is wrong beyond bytes: the index, and statistics that fit no packed weight."""
    try:
        folder = SafetensorsFolder(path)
        for name in folder.entries:
            prefix, mark, _ = name.partition(".quant_state.bitsandbytes__")
            if mark:
                state = {k: folder.map(k) for k in checkpoint.entry_names(folder.entries, prefix)}
                checkpoint.from_entries(state, prefix)
    except ValueError as error:
        return [Damage(path.name, None, str(error))]
    return []
