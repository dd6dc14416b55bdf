"""Weights in and out of Hugging Face folders (safetensors), without PyTorch.

`huggingface_names` says where each tensor lives and how it is turned; import and export both derive from
it. Both are strict: a tensor that is missing, unknown or of another shape is an error that names it and
its file.
"""

import contextlib
import functools
import json
import math
import pathlib
import re
import tempfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.huggingface_config import TRANSFORMERS_4, check_describes, config_to_dict, text_config
from jaxrl_llm.models.huggingface_names import Tensor, by_path, name_of, tensors
from jaxrl_llm.models.params import Tree, map_specs
from jaxrl_llm.models.transformer import param_specs

Index = tuple[slice, ...]

DTYPES = ("F64", "F32", "F16", "BF16")
MULTIMODAL_PREFIX = re.compile(r"^(?:model\.language_model\.|language_model\.model\.)")
SKIPPED = re.compile(r"rotary_emb\.inv_freq$")  # a constant that early Llama checkpoints stored
VISION = re.compile(r"^(?:model\.)?(?:vision_tower|multi_modal_projector)\.")
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


class Stored(NamedTuple):
    """A tensor found in a file, and its name there."""

    file: pathlib.Path
    handle: Any
    name: str


def load(
    folder: str | pathlib.Path, cfg: ModelConfig, *, dtype: Any = jnp.float32, shardings: Tree | None = None
) -> Tree:
    """Params from model.safetensors, or from the files of model.safetensors.index.json.

    Files are mapped into memory, and each process reads only the slices that its own devices hold.

    Args:
      folder: a Hugging Face model folder.
      cfg: its architecture, from `config_from_folder`.
      dtype: of the params.
      shardings: a tree like `param_specs(cfg)` of `jax.sharding.Sharding`; None = one local device.

    Raises:
      FileNotFoundError: the folder, or a file that its index names, is missing.
      ValueError: a truncated file; a tensor that is unset, unused, stored twice, of another shape than `cfg`
        says or of a dtype that is no plain float. Names the tensor and the file.
    """
    folder, wanted = pathlib.Path(folder), tensors(cfg)
    if shardings is None:
        one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = map_specs(lambda _: one_device, param_specs(cfg))
    with contextlib.ExitStack() as stack:
        found = _open(folder, cfg, stack)
        copied_head = found.pop(name_of("head", cfg), None) if cfg.tied_head else None
        _check(folder, wanted, found)
        if copied_head is not None:
            _check_tied(copied_head, found[name_of("embed", cfg)])
        sources: dict[str, list[tuple[Tensor, Stored]]] = {}
        for name, tensor in wanted.items():
            sources.setdefault(tensor.path, []).append((tensor, found[name]))

        specs, where = by_path(param_specs(cfg)), by_path(shardings)
        params = {
            path: _place(sources[path], specs[path].shape, where[path], np.dtype(dtype)) for path in specs
        }
    return jax.tree.unflatten(jax.tree.structure(shardings), [params[path] for path in where])


def save(
    folder: str | pathlib.Path,
    params: Tree,
    cfg: ModelConfig,
    *,
    hf_config: dict[str, Any] | None = None,
    dtype: Any = None,
    max_shard_bytes: int = 4 * 2**30,
) -> None:
    """Writes config.json and safetensors files that transformers' AutoModelForCausalLM loads.

    LLaDA and Dream load with the modeling code of their own repositories, which is not written here: copy it
    into the folder, and pass the `hf_config` of theirs, whose `auto_map` names it.

    Everything is written under temporary names first, so a full disk leaves an earlier export as it was;
    config.json appears last, so a folder that has one is whole. With several processes all must call
    this; the first one writes.

    Args:
      folder: made if absent. Weights of an earlier export in it are replaced, other files kept.
      params: as `param_specs(cfg)` describes, on any devices.
      hf_config: the config.json that the model came from (`read_config`), whose keys are kept; or, without
        a 'model_type', keys to add to the one written from `cfg` (eos_token_id, ...).
      dtype: of the tensors written; None = as they are.
      max_shard_bytes: a file is closed before it would pass this size.

    Raises:
      ValueError: params that do not fit `cfg`, or an `hf_config` that describes another model.
      OSError: the files could not be written.
    """
    own, wanted = by_path(params), tensors(cfg)
    _check_params(own, by_path(param_specs(cfg)))
    dtypes = {path: np.dtype(dtype or x.dtype) for path, x in own.items()}
    if hf_config and "model_type" in hf_config:
        config = text_config(hf_config)
    else:
        config = config_to_dict(cfg) | (hf_config or {})
    check_describes(config, cfg)
    dtype_keys = ("dtype", "torch_dtype") if cfg.family in TRANSFORMERS_4 else ("torch_dtype", "dtype")
    config = {k: v for k, v in config.items() if k != dtype_keys[0]} | {dtype_keys[1]: dtypes["embed"].name}

    sizes = {name: math.prod(t.shape) * dtypes[t.path].itemsize for name, t in wanted.items()}
    shards: list[list[str]] = [[]]
    for name in sizes:
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + sizes[name] > max_shard_bytes:
            shards.append([])
        shards[-1].append(name)
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    files = files if len(files) > 1 else ["model.safetensors"]
    index = {
        "metadata": {"total_size": sum(sizes.values())},
        "weight_map": {name: file for file, names in zip(files, shards) for name in names},
    }

    writes = jax.process_index() == 0
    folder = pathlib.Path(folder)
    with contextlib.ExitStack() as stack:
        temporary = pathlib.Path()
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
            temporary = pathlib.Path(
                stack.enter_context(tempfile.TemporaryDirectory(dir=folder, prefix=".tmp-"))
            )
        for file, names in zip(files, shards):
            arrays = {
                name: _fetch(own[wanted[name].path], wanted[name], dtypes[wanted[name].path])
                for name in names
            }
            if writes:
                try:
                    save_file(arrays, temporary / file, metadata={"format": "pt"})
                except (SafetensorError, OSError) as e:
                    raise OSError(
                        f"could not write {file} in {folder} ({e}); what was there is unchanged"
                    ) from e
        if writes:
            if len(files) > 1:
                files.append("model.safetensors.index.json")
                (temporary / files[-1]).write_text(json.dumps(index, indent=2))
            files.append("config.json")
            (temporary / files[-1]).write_text(json.dumps(config, indent=2) + "\n")
            (folder / "config.json").unlink(missing_ok=True)
            for old in folder.iterdir():
                if WEIGHTS.fullmatch(old.name):
                    old.unlink()
            for file in files:
                (temporary / file).replace(folder / file)


def _open(folder: pathlib.Path, cfg: ModelConfig, stack: contextlib.ExitStack) -> dict[str, Stored]:
    """Every tensor of the folder's files by its name in a text model, vision towers left out."""
    single, index_file = folder / "model.safetensors", folder / "model.safetensors.index.json"
    weight_map: dict[str, str] | None = None
    if single.is_file():
        files = [single]
    elif index_file.is_file():
        weight_map = json.loads(index_file.read_text())["weight_map"]
        files = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        raise FileNotFoundError(f"{folder} has neither {single.name} nor {index_file.name}")
    found: dict[str, Stored] = {}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; {index_file.name} names it")
        try:
            handle = stack.enter_context(safe_open(file, framework="numpy"))
        except SafetensorError as e:
            raise ValueError(f"{file} is truncated or no safetensors file: {e}") from e
        for name in handle.keys():  # noqa: SIM118 (no mapping)
            if weight_map is not None and weight_map.get(name) != file.name:
                raise ValueError(f"{file} holds {name}, which {index_file.name} does not place there")
            text_name = _text_name(name, cfg)
            if text_name in found:
                raise ValueError(f"{name} of {file} is stored twice; also in {found[text_name].file}")
            if text_name is not None:
                found[text_name] = Stored(file, handle, name)
    for name, file_name in (weight_map or {}).items():
        text_name = _text_name(name, cfg)
        if text_name is not None and text_name not in found:
            raise ValueError(f"{folder / file_name} lacks {name}, which {index_file.name} places there")
    return found


def _text_name(name: str, cfg: ModelConfig) -> str | None:
    """The tensor's name in a text-only checkpoint; None for what such a checkpoint does not have."""
    if cfg.family == "gemma3_text":
        if VISION.match(name):
            return None
        name = MULTIMODAL_PREFIX.sub("model.", name).removeprefix("language_model.")
    return None if SKIPPED.search(name) else name


def _check(folder: pathlib.Path, wanted: dict[str, Tensor], found: dict[str, Stored]) -> None:
    """Raises unless every tensor is there, as expected, and no other."""
    unset = [name for name in wanted if name not in found]
    unused = [
        f"{stored.name} (in {stored.file.name})" for name, stored in found.items() if name not in wanted
    ]
    problems = [f"it lacks {_some(unset)}"] * bool(unset) + [f"nothing uses {_some(unused)}"] * bool(unused)
    if problems:
        raise ValueError(f"{folder} does not hold the model of its config: {'; '.join(problems)}")
    for name, tensor in wanted.items():
        stored = found[name]
        view = stored.handle.get_slice(stored.name)
        if tuple(view.get_shape()) != tensor.shape:
            shape = tuple(view.get_shape())
            raise ValueError(
                f"{stored.name} in {stored.file} has shape {shape}; the config says {tensor.shape}"
            )
        if view.get_dtype() not in DTYPES:
            raise ValueError(f"{stored.name} in {stored.file} is {view.get_dtype()}, not {', '.join(DTYPES)}")


def _check_tied(head: Stored, embed: Stored, rows: int = 8192) -> None:
    """Some tied checkpoints store the head as well: accepted where it equals the embedding."""
    one, other = head.handle.get_slice(head.name), embed.handle.get_slice(embed.name)
    same = one.get_shape() == other.get_shape() and one.get_dtype() == other.get_dtype()
    size = one.get_shape()[0]
    for start in range(0, size if same else 0, rows):
        part = slice(start, min(start + rows, size))
        same = same and np.array_equal(one[part], other[part])
    if not same:
        raise ValueError(
            f"{head.name} in {head.file} differs from {embed.name} although the config ties them; "
            "set tie_word_embeddings to false in config.json to use both"
        )


def _place(
    pieces: list[tuple[Tensor, Stored]], shape: tuple[int, ...], sharding: Sharding, dtype: np.dtype
) -> jax.Array:
    """A parameter on its devices, from one tensor or from one per layer."""

    @functools.cache  # devices often hold the same slice
    def assemble(bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        index = tuple(slice(*b) for b in bounds)
        if pieces[0][0].layer is None:
            return _read(*pieces[0], index).astype(dtype)
        out = np.empty([stop - start for start, stop in bounds], dtype)
        for row, (tensor, stored) in zip(out, pieces[index[0]]):
            row[...] = _read(tensor, stored, index[1:])
        return out

    def read(index: Index | None) -> np.ndarray:
        assert index is not None
        return assemble(tuple(s.indices(size)[:2] for s, size in zip(index, shape)))

    return jax.make_array_from_callback(shape, sharding, read)


def _read(tensor: Tensor, stored: Stored, index: Index) -> np.ndarray:
    """The slice `index` (in our layout, bounds resolved) of one tensor; reads no more than the rows and
    columns that it needs."""
    view = stored.handle.get_slice(stored.name)
    if tensor.inputs is None:
        return view[index]
    sizes, inner, spans = [], [], []
    for part in (slice(tensor.inputs, None), slice(None, tensor.inputs)):
        shape, ranges = tensor.own_shape[part], index[part]
        if shape:  # the outer dimension is cut while reading, the others of a flattened group afterwards
            stride = math.prod(shape[1:])
            spans.append(slice(ranges[0].start * stride, ranges[0].stop * stride))
            sizes += [ranges[0].stop - ranges[0].start, *shape[1:]]
            inner += [slice(None), *ranges[1:]]
    block = view[tuple(spans)].reshape(sizes)[tuple(inner)]
    outputs = block.ndim - tensor.inputs
    return block.transpose(*range(outputs, block.ndim), *range(outputs))


def _fetch(x: Any, tensor: Tensor, dtype: np.dtype) -> np.ndarray:
    """One tensor on the host, in the file's layout: of a stacked parameter one layer."""
    layer = tensor.layer
    if isinstance(x, jax.Array) and isinstance(x.sharding, NamedSharding):
        x, layer = _gather(NamedSharding(x.sharding.mesh, PartitionSpec()))(x, layer), None
    y = np.asarray(x if layer is None else x[layer])
    if tensor.inputs is not None:
        y = y.reshape(math.prod(tensor.own_shape[: tensor.inputs]), -1).T.reshape(tensor.shape)
    return np.ascontiguousarray(y.astype(dtype))


@functools.cache
def _gather(sharding: NamedSharding) -> Any:
    """A compiled (array, layer or None) -> that layer of it, whole on every device."""
    return jax.jit(lambda x, layer: x if layer is None else x[layer], out_shardings=sharding)


def _check_params(own: dict[str, Any], specs: dict[str, Any]) -> None:
    """Raises unless the params are those of the config."""
    for path in [*specs, *own]:
        if path not in own or path not in specs:
            raise ValueError(f"params {'lack' if path in specs else 'have an unknown'} {path}")
        if own[path].shape != specs[path].shape:
            raise ValueError(f"{path} has shape {own[path].shape}; the config says {specs[path].shape}")


def _some(names: list[str], most: int = 5) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
