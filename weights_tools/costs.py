"""What a checkpoint's architecture costs: bytes of weights by precision, bytes read, arithmetic, memory at work.

Everything follows from the config files; tensors exist on the meta device alone. Weights count two bytes a number
(bfloat16) unless they are packed, or cast to float32 when they are loaded (`Costs.itemsize`). What is taken from
measurements is a constant with its source.

Letters: S tokens of the decoder, P its patches, D width, L layers, N emitted tokens, T prompt tokens.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmimg.checkpoint import COMPONENTS, EMBEDDED, PICTURE_PARTS
from glmimg.errors import BadInput, UnknownName
from glmimg.fused_linear import COPY_BELOW
from glmimg.generator import PACK_BELOW
from glmimg.packed_format import CONFIG_KEY, GROUP, KERNEL_GROUPS, group_size
from glmimg.presets import PRESETS
from glmimg.token_grid import preview_grid, target_grid
from glmimg.weights_tools.fit import expected_shapes
from glmimg.weights_tools.inspect import default_size, open_headers
from glmimg.weights_tools.packing_plan import PACKABLE, packed_nbytes, units
from glmimg.weights_tools.published import NAMES, PUBLISHED

__all__ = ["Costs", "Workload", "costs_of"]

Shapes = dict[str, tuple[int, ...]]

PROMPT_TOKENS = 64
GLYPH_TOKENS = 16
# What unpacking a weight for one product reads and writes beside the packed bytes, in bytes for each weight. 8 bits: a
# copy in 16 bits is written and read, the result is scaled. 4 bits: split, joined, shifted and scaled before that.
UNPACK_TRAFFIC = {16: 0, 8: 4, 4: 17}


@dataclass(frozen=True)
class Workload:
    """`pictures` of height x width at once, in `steps` of the decoder with or without guidance."""

    height: int
    width: int
    pictures: int
    steps: int
    guidance: bool
    prompt_tokens: int = PROMPT_TOKENS

    def __post_init__(self) -> None:
        for name in ("height", "width", "pictures", "steps"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} {getattr(self, name)}: give 1 or more")

    @property
    def patches(self) -> int:
        return self.height * self.width // 256


@dataclass(frozen=True)
class Costs:
    """A checkpoint's configuration with the shapes of all its tensors."""

    name: str
    configs: dict[str, dict[str, Any]]
    shapes: dict[str, Shapes]
    itemsize: int = 2  # bytes of a number at work: 4 on a processor without instructions for bfloat16

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width), as glmimg.checkpoint reads it."""
        height, width = default_size(self.configs["generation"])
        return height, width

    @property
    def default_steps(self) -> int:
        """Of the decoder."""
        return int(self.configs["generation"].get("num_inference_steps", 50))

    # Bytes of weights.

    def weights(self, component: str, bits: int = 16, *, whole: bool = False, only: str = "") -> int:
        """Of a component, its packable matrices in `bits`; `whole`: with what text-to-image leaves out. `only`: of
        tensors whose name matches this expression."""
        tensors = self._tensors(component, whole=whole, only=only)
        total = self.itemsize * sum(math.prod(shape) for _, shape in tensors.values())
        if bits < 16:
            for unit in units(component, tensors, low=bits):
                total -= unit.kept // 2 * self.itemsize - packed_nbytes(unit, min(unit.allowed), GROUP)
        return total

    def _tensors(
        self, component: str, *, whole: bool = False, only: str = ""
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (dtype, shape), as `units` takes them."""
        left_out = () if whole else PICTURE_PARTS.get(component, ())
        shapes = self.shapes[component].items()
        return {n: ("BF16", s) for n, s in shapes if not n.startswith(left_out) and re.match(only, n)}

    def vae_bytes(self) -> int:
        """The VAE's decoder, in the dtype that it runs in."""
        return self.weights("vae") * self.vae_itemsize // self.itemsize

    @property
    def vae_itemsize(self) -> int:
        """4 where the config asks for float32."""
        return 4 if self.configs["vae"].get("force_upcast", True) else self.itemsize

    def building(self, bits: int) -> int:
        """What the generator needs beside its weights while it is built: copies that join its projections."""
        layers = self.weights("vision_language_encoder", bits, only=r"model\.language_model\.layers\.")
        if bits == 16 and layers <= PACK_BELOW:
            return layers
        return self.weights("vision_language_encoder", bits, only=r".*self_attn\.[qkv]_proj")

    def host_copies(self, bits: int) -> tuple[int, int]:
        """What (generator, decoder) keep on a processor beside their weights, which stay mapped from the files: a small
        decoder its unpacked matrices laid out for oneDNN. Where weights are cast, laid out ones alone. Below 0 where
        blocks' files can go: the generator's in 8 bits (16), or laid out for the 4-bit kernel, scales twice (4).
        """
        language, laid_out = self._packed_numbers("vision_language_encoder"), 0
        if self.blocks("transformer", bits) <= COPY_BELOW:
            matrices = r"transformer_blocks\..*(?<!norm_q)(?<!norm_k)\.weight"
            laid_out = self.weights("transformer", bits, only=matrices)
            if bits < 16:
                laid_out -= self.weights("transformer", bits, only=PACKABLE["transformer"])
        if bits == 16 and self.itemsize > 2:
            layers = self.blocks("vision_language_encoder")
            return layers if layers <= PACK_BELOW else 0, laid_out
        if bits == 16:
            head = self.weights("vision_language_encoder", only="lm_head") // 2
            return language + head - self.blocks("vision_language_encoder"), laid_out
        if bits == 4:
            found = units("vision_language_encoder", self._tensors("vision_language_encoder"))
            columns = {columns for unit in found for _, columns in unit.layers.values()}
            if not all(group_size(width) in KERNEL_GROUPS for width in columns):
                return language // 2, laid_out  # what the kernel does not take keeps its block's file
            return language // 2 + 4 * language // GROUP - self.blocks("vision_language_encoder", 4), laid_out
        return 0, laid_out

    def block(self, component: str, bits: int = 16) -> int:
        """One transformer block."""
        pattern = {
            "vision_language_encoder": r"model\.language_model\.layers\.0\.",
            "transformer": r"transformer_blocks\.0\.",
        }
        return self.weights(component, bits, only=pattern[component])

    def blocks(self, component: str, bits: int = 16) -> int:
        """All transformer blocks."""
        return self.block(component, bits) * self.layers(component)

    def layers(self, component: str) -> int:
        """How many transformer blocks there are."""
        config = self.configs[component]
        if component == "vision_language_encoder":
            return int(config["text_config"]["num_hidden_layers"])
        return int(config["num_layers"])

    # The token generator.

    @property
    def _text(self) -> dict[str, Any]:
        return self.configs["vision_language_encoder"]["text_config"]

    def tokens(self, work: Workload) -> int:
        """Tokens that a picture takes: preview and target grid."""
        generation = self.configs.get("generation", {})
        preview = preview_grid(work.height, work.width, generation.get("preview_side", 16))
        return math.prod(preview) + math.prod(target_grid(work.height, work.width))

    def cache(self, work: Workload) -> int:
        """Keys and values of all pictures."""
        text = self._text
        width = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
        per_token = 2 * text["num_hidden_layers"] * text["num_key_value_heads"] * width * self.itemsize
        return per_token * (work.prompt_tokens + self.tokens(work)) * work.pictures

    def step_traffic(self, work: Workload, bits: int, kernels: bool) -> int:
        """Bytes read and written to emit a token of every picture; `kernels` take packed weights as they are."""
        layers = self.blocks("vision_language_encoder", bits)
        head = self.weights("vision_language_encoder", only="lm_head")
        unpacking = 0 if kernels else self._unpacking("vision_language_encoder", bits)
        return layers + head + unpacking + self.cache(work) // 2

    def _unpacking(self, component: str, bits: int) -> int:
        return UNPACK_TRAFFIC[bits] * self.itemsize // 2 * self._packed_numbers(component)

    def _packed_numbers(self, component: str) -> int:
        """Numbers in the matrices that quantising packs."""
        return sum(unit.kept // 2 for unit in units(component, self._tensors(component)))

    def step_ops(self) -> int:
        """Calls of the device that a step of the generator makes."""
        return 6 + 20 * int(self._text["num_hidden_layers"])

    def token_flops(self, work: Workload) -> float:
        """Of all tokens of all pictures, prompts included."""
        numbers = self._packed_numbers("vision_language_encoder")
        return 2.0 * numbers * (self.tokens(work) + work.prompt_tokens) * work.pictures

    # The decoder.

    @property
    def _width(self) -> int:
        config = self.configs["transformer"]
        return int(config["num_attention_heads"] * config["attention_head_dim"])

    def forward_flops(self, work: Workload) -> float:
        """One forward of one picture: products with every token, and attention."""
        tokens = work.patches + GLYPH_TOKENS
        layers = int(self.configs["transformer"]["num_layers"])
        return 2.0 * self._packed_numbers("transformer") * tokens + 4.0 * tokens**2 * self._width * layers

    def forwards(self, work: Workload) -> int:
        """Forwards of one picture."""
        return work.steps * (2 if work.guidance else 1)

    def unpacked_per_forward(self, bits: int) -> int:
        """Bytes read and written to make the decoder's weights whole, and to read them, once."""
        return self.weights("transformer", bits) + self._unpacking("transformer", bits)

    def decoder_activations(self, work: Workload, batch: int) -> int:
        """At the widest place of a block: the stream, the feed-forward's 4D before and after its activation, and
        queries and keys in float32 while they are turned; 14 numbers for each of a token's channels."""
        return 14 * self.itemsize * (work.patches + GLYPH_TOKENS) * self._width * batch

    def whole_matrix(self, bits: int) -> int:
        """The largest packed weight of the decoder or the generator, made whole for a product."""
        if bits == 16:
            return 0
        sizes = [
            self.itemsize * rows * columns
            for component in ("transformer", "vision_language_encoder")
            for unit in units(component, self._tensors(component, whole=True))
            for rows, columns in unit.layers.values()
        ]
        return 2 * max(sizes, default=0)  # before and after scaling

    # The VAE.

    def vae_activations(self, height: int, width: int) -> int:
        """Three tensors (input, normed, activated) as wide as the widest input of a residual block."""
        channels = [int(c) for c in self.configs["vae"]["block_out_channels"]][::-1]
        inputs = [channels[0], *channels[:-1]]
        widest = max(c / 4 ** (len(channels) - 1 - k) for k, c in enumerate(inputs))
        return int(3 * widest * height * width * self.vae_itemsize)

    def vae_flops(self, work: Workload) -> float:
        """Of one picture's decoding: each convolution at its resolution."""
        count = len(self.configs["vae"]["block_out_channels"])
        total = 0.0
        for name, shape in self.shapes["vae"].items():
            if not name.startswith("decoder.") or len(shape) != 4:
                continue
            number = re.match(r"decoder\.up_blocks\.(\d+)\.(upsamplers)?", name)
            level = (int(number[1]) + bool(number[2])) if number else count - 1 if "conv_out" in name else 0
            total += 2.0 * math.prod(shape) * work.height * work.width / 4 ** (count - 1 - level)
        return total


def costs_of(source: str | Path) -> Costs:
    """Of a preset, the published model ("glm-image" or its hub id), the embedded one, or whatever `weights inspect`
    reads: a folder's config.json files will do, of another hub id only settings and headers are fetched."""
    text = str(source)
    folder = os.path.isdir(os.path.expanduser(text))  # which that name then means everywhere
    if text in NAMES and not folder:
        return _costs("zai-org/GLM-Image", PUBLISHED)
    if text in PRESETS and not folder:
        return _costs(text, PRESETS[text])
    if text.count("/") == 0 and text != EMBEDDED and not os.path.exists(text):
        raise UnknownName.of("model", text, [*PRESETS, *NAMES, EMBEDDED])
    contents = open_headers(text)
    configs = {component: contents.config(component) for component in COMPONENTS}
    path = "vision_language_encoder/generation_config.json"
    configs["generation"] = contents.json(path) if path in contents.files else {}
    if any(CONFIG_KEY in config for config in configs.values()):
        raise BadInput(f"{text} is quantised already: plan with the original, which the plan quantises by itself")
    return _costs(text, configs)


def _costs(name: str, configs: Mapping[str, dict[str, Any]]) -> Costs:
    return Costs(name, dict(configs), {part: expected_shapes(part, configs[part]) for part in COMPONENTS})
