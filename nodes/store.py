"""Small files that nodes make and read: fitted coefficients and time predictors, in ComfyUI's models/rudder folder."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import folder_paths
from safetensors.torch import load as read
from safetensors.torch import save_file
from torch import Tensor

NAME = "rudder"
SUFFIX = ".safetensors"


def folder(kind: str) -> Path:
    """``models/rudder/<kind>``, which extra_model_paths.yaml may extend under the key ``rudder_<kind>``."""
    path = Path(folder_paths.models_dir) / NAME / kind
    folder_paths.add_model_folder_path(f"{NAME}_{kind}", str(path), is_default=True)
    return path


def names(kind: str) -> list[str]:
    """The files of a kind, in every folder that ComfyUI knows for it."""
    if folder(kind).is_dir() or len(folder_paths.get_folder_paths(f"{NAME}_{kind}")) > 1:
        return [name for name in folder_paths.get_filename_list(f"{NAME}_{kind}") if name.endswith(SUFFIX)]
    return []


def target(kind: str, name: str) -> Path:
    """Where a node saves ``name``.

    Raises:
        ValueError: the name is empty or leaves the folder.
    """
    plain = name.strip().removesuffix(SUFFIX)
    if not plain or plain.startswith(".") or any(c in plain for c in '/\\:*?"<>|\0'):
        raise ValueError(f"'{name}' is no file name. Give 'name' a plain one without folders, such as my-model.")
    return folder(kind) / (plain + SUFFIX)


def prepare(file: Path) -> None:
    """Find out before the work whether its result can be saved; nothing stays behind.

    Raises:
        ValueError: it cannot; names the file and why.
    """
    part, made = file.with_suffix(".part"), [place for place in file.parents if not place.exists()]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        part.unlink()
    except OSError as error:
        raise ValueError(f"'name': {file} could not be written ({error}). Free that folder, or choose another name."
                         ) from error
    finally:
        for place in made:  # the deepest first
            with suppress(OSError):
                place.rmdir()


def save(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Written whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, metadata)
    part.replace(file)


def load(file: Path) -> dict[str, Tensor]:
    """Tensors of a file.

    Raises:
        ValueError: it is no safetensors file; names it.
    """
    try:
        # A mapped file could not be replaced on Windows while its tensors are in use. Bytes come in any order.
        return dict(sorted(read(file.read_bytes()).items()))
    except Exception as error:
        message = f"{file} cannot be read as safetensors ({error}). Delete it, or choose another name."
        raise ValueError(message) from error
