"""The token generator or the decoder as a GGUF file, and back, through the `gguf` library.

Tensors keep their names and, unless they are quantised, their bytes. The settings go twice: as GGUF's own keys, for
programs that read those, and as the json files they came from ("glmimg.file.config.json"), to come back exactly.
"""

from __future__ import annotations

import json
import math
import re
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from glmimg.atomic_write import atomic_file
from glmimg.errors import BadInput, CheckpointError, MissingExtra
from glmimg.packed_format import CONFIG_KEY
from glmimg.weights_tools.fit import PARTS, TEXT_TO_IMAGE, is_pruned
from glmimg.weights_tools.layouts import Contents, StoredTensor
from glmimg.weights_tools.packing_plan import EIGHT_ONLY, PACKABLE
from glmimg.weights_tools.streaming import (
    PIECE,
    Buffer,
    Progress,
    TensorSpec,
    as_bytes,
    require_space,
    sync_folder,
    torch_dtype,
)

__all__ = ["ARCHITECTURES", "QUANTIZED", "read_gguf", "write_gguf"]

# Component -> what general.architecture says.
ARCHITECTURES = {"vision_language_encoder": "glm_image", "transformer": "glm_image_decoder"}
# Types that the gguf library can pack: blocks of 32 weights.
QUANTIZED = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
_PLAIN = ("F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64")  # the same name and bytes in both formats
_OWN = "glmimg."
_FILES = ("config.json", "generation_config.json")
_LONGEST = 63  # bytes of a tensor's name, in ggml
_MOST_VALUES = 200_000  # of metadata and tensors' descriptions; what lies in arrays is passed over
_MOST_TEXTS = 5_000_000  # in an array: the published vocabulary has half a million with its merges


def write_gguf(
    contents: Contents,
    component: str,
    target: Path,
    *,
    quantized: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes one component. `quantized` packs the layers that `glmimg weights quantize` would pack, in that type; those
    of the vision tower, which picks ids by nearest neighbour, never in less than eight bits."""
    library = _library()
    if component not in ARCHITECTURES or component not in contents.tensors:
        held = [name for name in ARCHITECTURES if name in contents.tensors]
        raise BadInput(f"GGUF holds one of {', '.join(held) or '(none of this source)'}, not {component}")
    if CONFIG_KEY in contents.config(component):
        raise BadInput(f"{component} is quantised, and GGUF has no such type: convert the original checkpoint")
    tensors = contents.tensors[component]
    bad = [name for name, tensor in tensors.items() if tensor.spec.dtype not in _PLAIN]
    if bad:
        dtype = tensors[bad[0]].spec.dtype
        raise BadInput(f"{bad[0]} is {dtype}, which GGUF lacks: convert with --dtype bfloat16 first")
    long = [name for name in tensors if len(name.encode()) > _LONGEST]
    if long:
        raise BadInput(f"tensor {long[0]!r} has a longer name than GGUF's {_LONGEST} bytes")
    packed = _packed_layers(component, tensors) if quantized else set()
    if quantized and not packed:
        raise BadInput(f"{component} has nothing to pack in {quantized}: rows must hold whole blocks of 32 weights")
    written = {
        name: _Tensor(library, tensor, _type(name, quantized) if name in packed else None)
        for name, tensor in tensors.items()
    }
    total = sum(item.nbytes for item in written.values())
    require_space(target, total)
    with atomic_file(target, replace=False) as temporary:
        writer = library.GGUFWriter(temporary, ARCHITECTURES[component])
        try:
            with _told(component):
                _describe(writer, contents, component, quantized, [tensors[name].spec.dtype for name in tensors])
                for name, item in written.items():
                    writer.add_tensor_info(name, tensors[name].spec.shape, item.dtype, item.nbytes, raw_dtype=item.kind)
                if packed:
                    was = {name: tensors[name].spec.dtype for name in sorted(packed)}
                    writer.add_string(_OWN + "dtypes", json.dumps(was))
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            done = 0
            for item in written.values():
                writer.write_tensor_data(item)
                done += item.nbytes
                if progress:
                    progress(done, total)
        finally:
            writer.close()
    sync_folder(target.absolute().parent)


def read_gguf(path: Path) -> Contents:
    """Opens a GGUF file of either component; quantised tensors are unpacked while they are read."""
    library = _library()
    try:
        reader = _strict_reader(library)(path)
        values = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
        found = {tensor.name: tensor for tensor in reader.tensors}
    except Exception as error:  # the library raises whatever its arithmetic runs into
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{path} is no sound GGUF file ({type(error).__name__}: {reason:.200})") from error
    component = next((name for name, word in ARCHITECTURES.items() if values.get("general.architecture") == word), None)
    if component is None:
        raise BadInput(
            f"{path} holds {values.get('general.architecture')!r:.80}; read are {', '.join(ARCHITECTURES.values())}"
        )
    if reader.byte_order != "I":
        raise CheckpointError(f"{path} was written for machines of the other byte order")
    reached = 0
    for tensor in sorted(found.values(), key=lambda tensor: tensor.data_offset):
        if not tensor.name.isprintable():
            raise CheckpointError(f"{path}: tensor {tensor.name!r:.100} has signs in its name that cannot be printed")
        if tensor.data_offset < reached:
            raise CheckpointError(f"{path}: tensor {tensor.name!r:.100} overlaps another: do not use this file")
        reached = tensor.data_offset + tensor.n_bytes
    was = _dtypes(values.get(_OWN + "dtypes"), path)
    tensors = {name: _stored(library, path, tensor, was.get(name, "F32")) for name, tensor in found.items()}
    files = {}
    for name in _FILES:
        text = values.get(f"{_OWN}file.{name}")
        if isinstance(text, str):
            files[f"{component}/{name}"] = text.encode()
    if values.get(_OWN + "parts") == TEXT_TO_IMAGE:
        files["model_index.json"] = json.dumps({"_class_name": "GlmImagePipeline", PARTS: TEXT_TO_IMAGE}).encode()
    return Contents("gguf", {component: tensors}, files)


class _Tensor:
    """Stands for an array where the library's writer asks for one: it has a size and can write itself to a file."""

    def __init__(self, library: Any, tensor: StoredTensor, quantized: str | None) -> None:
        import numpy

        kinds = library.GGMLQuantizationType
        self.kind = kinds[(quantized or tensor.spec.dtype).upper()]
        self.dtype = numpy.dtype(numpy.void)  # the library looks at the raw type instead
        block, size = library.GGML_QUANT_SIZES[self.kind]
        self.nbytes = math.prod(tensor.spec.shape) // block * size
        self._pieces: Callable[[], Iterable[Buffer]] = tensor.pieces
        if quantized:
            self._pieces = lambda: _quantized(library, tensor, self.kind, block)

    def tofile(self, stream: IO[bytes]) -> None:
        for piece in self._pieces():
            stream.write(piece)


def _quantized(library: Any, tensor: StoredTensor, kind: Any, block: int) -> Iterator[Buffer]:
    import numpy

    for piece in tensor.cast("F32").pieces():
        yield library.quants.quantize(numpy.frombuffer(piece, numpy.float32).reshape(-1, block), kind).tobytes()


def _type(name: str, quantized: str | None) -> str | None:
    return "q8_0" if EIGHT_ONLY.fullmatch(name.removesuffix(".weight")) else quantized


def _packed_layers(component: str, tensors: dict[str, StoredTensor]) -> set[str]:
    layer = re.compile(PACKABLE[component])
    return {
        name
        for name, tensor in tensors.items()
        if name.endswith(".weight")
        and layer.fullmatch(name.removesuffix(".weight"))
        and len(tensor.spec.shape) == 2
        and tensor.spec.shape[1] % 32 == 0
        and tensor.spec.dtype in ("F32", "F16", "BF16")
    }


def _stored(library: Any, path: Path, tensor: Any, dtype: str) -> StoredTensor:
    kind = tensor.tensor_type
    shape = tuple(int(size) for size in reversed(tensor.shape.tolist()))
    block, size = library.GGML_QUANT_SIZES[kind]
    begin, nbytes = int(tensor.data_offset), int(tensor.n_bytes)
    if math.prod(shape) // block * size != nbytes:
        raise CheckpointError(f"{path}: tensor {tensor.name!r:.100} has {nbytes} bytes, which its shape does not fill")

    def raw(limit: int = PIECE) -> Iterator[Buffer]:
        with path.open("rb", buffering=0) as stream:
            stream.seek(begin)
            left = nbytes
            while left:
                piece = bytearray(stream.read(min(left, limit)))
                if not piece or len(piece) % size:
                    raise CheckpointError(f"{path} became shorter while it was read")
                left -= len(piece)
                yield piece

    if kind.name in _PLAIN:
        return StoredTensor(TensorSpec(kind.name, shape), raw)
    import numpy

    try:  # one block of nothing tells whether the library knows how
        library.quants.dequantize(numpy.zeros((1, size), numpy.uint8), kind)
    except NotImplementedError as error:
        raise CheckpointError(
            f"{path}: tensor {tensor.name!r:.100} is packed as {kind.name}, which the gguf library cannot unpack; "
            f"take a file in {', '.join(QUANTIZED)} or a plain one"
        ) from error

    def unpacked() -> Iterator[Buffer]:
        import torch

        for piece in raw(PIECE // size * size):
            array = library.quants.dequantize(numpy.frombuffer(piece, numpy.uint8).reshape(-1, size), kind)
            values = torch.from_numpy(array.reshape(-1)).to(torch_dtype(dtype))
            yield as_bytes(values)

    return StoredTensor(TensorSpec(dtype, shape), unpacked)


def _dtypes(text: object, path: Path) -> dict[str, str]:
    try:
        found = json.loads(text) if isinstance(text, str) else {}
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(value in ("F32", "F16", "BF16") for value in found.values()):
        raise CheckpointError(f"{path}: {_OWN}dtypes is damaged")
    return found


@contextmanager
def _told(component: str) -> Iterator[None]:
    """Settings of a stranger hold anything where numbers and texts should be."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, struct.error) as error:
        raise CheckpointError(
            f"the config or the tokenizer of {component} cannot be told in GGUF ({type(error).__name__}: "
            f"{str(error):.100}): check them with glmimg weights verify"
        ) from error


def _describe(writer: Any, contents: Contents, component: str, quantized: str | None, dtypes: list[str]) -> None:
    """GGUF's own keys, then ours."""
    import gguf

    config = contents.config(component)
    writer.add_type("model")
    writer.add_name(f"GLM-Image {'decoder' if component == 'transformer' else 'token generator'}")
    common = max(sorted(set(dtypes)), key=dtypes.count)
    word = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16"}.get(common, "GUESSED")
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{quantized.upper()}" if quantized else word])
    if quantized:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    told: list[tuple[Callable[[Any], None], Any]]
    if component == "transformer":
        heads, side = config.get("num_attention_heads"), config.get("attention_head_dim")
        told = [
            (writer.add_block_count, config.get("num_layers")),
            (writer.add_head_count, heads),
            (writer.add_embedding_length, heads * side if heads and side else None),
        ]
    else:
        text = config["text_config"]
        told = [
            (writer.add_block_count, text.get("num_hidden_layers")),
            (writer.add_head_count, text.get("num_attention_heads")),
            (writer.add_head_count_kv, text.get("num_key_value_heads")),
            (writer.add_embedding_length, text.get("hidden_size")),
            (writer.add_feed_forward_length, text.get("intermediate_size")),
            (writer.add_context_length, text.get("max_position_embeddings")),
            (writer.add_layer_norm_rms_eps, text.get("rms_norm_eps")),
            (writer.add_rope_freq_base, (text.get("rope_parameters") or {}).get("rope_theta")),
            (writer.add_vocab_size, text.get("vocab_size")),
        ]
        if "processor/tokenizer.json" in contents.files:
            _add_tokenizer(writer, contents.json("processor/tokenizer.json"), text)
            told += [(writer.add_eos_token_id, text.get("eos_token_id"))]
            told += [(writer.add_pad_token_id, text.get("pad_token_id"))]
    for add, value in told:  # a config may leave to its class what is usual
        if isinstance(value, int | float):
            add(value)
    writer.add_string(_OWN + "component", component)
    for name in _FILES:
        if f"{component}/{name}" in contents.files:
            writer.add_string(f"{_OWN}file.{name}", contents.files[f"{component}/{name}"].decode())
    if is_pruned(contents) and component != "transformer":
        writer.add_string(_OWN + "parts", TEXT_TO_IMAGE)


def _add_tokenizer(writer: Any, tokenizer: dict[str, Any], text: dict[str, Any]) -> None:
    """The byte-level vocabulary and its merges as llama.cpp's family of programs keeps them."""
    from gguf import TokenType

    model = tokenizer.get("model", {})
    if model.get("type") != "BPE":
        raise CheckpointError(f"processor/tokenizer.json is a {model.get('type')} tokenizer; a BPE one is expected")
    tokens: dict[int, tuple[str, Any]] = {index: (token, TokenType.NORMAL) for token, index in model["vocab"].items()}
    for added in tokenizer.get("added_tokens", []):
        kind = TokenType.CONTROL if added.get("special") else TokenType.USER_DEFINED
        tokens[added["id"]] = (added["content"], kind)
    listed = [tokens.get(index, (f"<|unused_{index}|>", TokenType.UNUSED)) for index in range(text["vocab_size"])]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges", [])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([token for token, _ in listed])
    writer.add_token_types([kind for _, kind in listed])
    if merges:
        writer.add_token_merges(merges)


def _strict_reader(library: Any) -> Any:
    class StrictReader(library.GGUFReader):
        """Refuses what lies outside the file, which the library would take for nothing, and endless metadata; passes
        over arrays, of which the library would make an object for each number."""

        taken = 0

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            import numpy

            self.taken += 1
            end = int(offset) + numpy.dtype(dtype).itemsize * int(count)
            if end > len(self.data) or self.taken > _MOST_VALUES:
                raise ValueError("it is cut short" if end > len(self.data) else "it has too many values")
            return super()._get(offset, dtype, count, override_order)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            import numpy

            kinds = library.GGUFValueType
            if raw_type != kinds.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            kind, count = kinds(self._get(orig_offs, numpy.uint32)[0]), int(self._get(orig_offs + 4, numpy.uint64)[0])
            end = int(orig_offs) + 12
            if kind == kinds.STRING:
                if count > _MOST_TEXTS:
                    raise ValueError("it has too many values")
                data, order = memoryview(self.data), sys.byteorder if self.byte_order == "I" else "big"
                for _ in range(count):
                    end += 8 + int.from_bytes(data[end : end + 8], order)
                    if end > len(data):
                        break
            else:
                end += numpy.dtype(self.gguf_scalar_to_np[kind]).itemsize * count
            if end > len(self.data):
                raise ValueError("it is cut short")
            return end - int(orig_offs), [], [], [kinds.ARRAY]

    return StrictReader


def _library() -> Any:
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise MissingExtra.of("gguf", "gguf", "reading and writing GGUF files") from error
    return gguf
