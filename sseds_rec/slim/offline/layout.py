"""Where the tensors of a distributed checkpoint lie in its files."""

from __future__ import annotations

from pathlib import Path

from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from sseds_rec.errors import UserError
from sseds_rec.slim.offline.stored import StoredChunk, StoredTensor, damaged, locate


def check_files(folder: Path, metadata: Metadata) -> None:
    """Refuses a checkpoint of which a file is missing or shorter than what it should hold.

    Raises:
        UserError: names the file.
    """
    try:
        ends = _ends(folder, metadata)
    except (TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{folder}: its .metadata contradicts itself ({type(error).__name__}); restore the checkpoint"
        ) from None
    for file, end in ends.items():
        path = folder / file
        size = path.stat().st_size if path.is_file() else None
        if size is None or size < end:
            raise damaged(path, "no such file" if size is None else f"it has {size:,} bytes of at least {end:,}")


def _ends(folder: Path, metadata: Metadata) -> dict[str, int]:
    """File -> how long it must be at least."""
    ends: dict[str, int] = {}
    for name, entry in metadata.state_dict_metadata.items():
        chunks = [chunk.offsets for chunk in entry.chunks] if isinstance(entry, TensorStorageMetadata) else [None]
        for offsets in chunks:
            info = metadata.storage_data.get(MetadataIndex(name, offsets))
            if info is None or info.offset < 0 or info.length < 0:
                raise UserError(f"{folder}: its metadata does not say where {name} is; restore the checkpoint")
            if Path(info.relative_path).name != info.relative_path:
                raise UserError(f"{folder}: its metadata names the file {info.relative_path}, outside of its folder")
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    return ends


def stored_tensor(folder: Path, metadata: Metadata, name: str, shards: int = 1) -> StoredTensor:
    """A tensor of a checkpoint, as it lies in its files.

    Args:
        folder: the checkpoint.
        metadata: of it.
        name: entry of two dimensions [rows, columns] or of one, [shards * rows], which is taken as [rows, shards].
        shards: see `name`.

    Raises:
        UserError: a part of it is missing or damaged, or is stored in a way that rows cannot be read from.
    """
    entry = metadata.state_dict_metadata[name]
    assert isinstance(entry, TensorStorageMetadata)
    rows = entry.size[0] // (shards if len(entry.size) == 1 else 1)
    chunks = []
    for part in entry.chunks:
        info = metadata.storage_data[MetadataIndex(name, part.offsets)]
        path = folder / info.relative_path
        if info.transform_descriptors:
            raise UserError(
                f"{path}: {name} is stored through {', '.join(info.transform_descriptors)}; save the checkpoint without"
            )
        if not part.sizes.numel():
            continue  # of a rank that holds no rows
        tensor, position, checksum = locate(path, info.offset, info.length)
        if tensor.shape != part.sizes or tensor.dtype != entry.properties.dtype:
            raise damaged(path, f"{name} is {list(tensor.shape)} of {tensor.dtype} there, its metadata says otherwise")
        if tensor.stride()[1:] not in ((), (1,)):
            raise UserError(f"{path}: {name} is not stored row by row; save a contiguous copy of it")
        if len(part.sizes) == 2:
            (first_row, first_column), columns = part.offsets, part.sizes[1]
        else:
            first_column, first_row = divmod(part.offsets[0], rows)
            columns = 1
        chunks.append(
            StoredChunk(
                path,
                position,
                tensor.stride(0) * tensor.element_size(),
                first_row,
                part.sizes[0],
                first_column,
                columns,
                tensor.dtype,
                checksum,
            )
        )
    width = entry.size[1] if len(entry.size) == 2 else shards
    return StoredTensor(name, rows, width, entry.properties.dtype, tuple(chunks))


def column_shards(entry: TensorStorageMetadata) -> list[int]:
    """Widths of the column-wise shards of a tensor [rows, D]."""
    widths = [width for _, width in sorted({(chunk.offsets[1], chunk.sizes[1]) for chunk in entry.chunks})]
    return widths if sum(widths) == entry.size[1] else [entry.size[1]]
