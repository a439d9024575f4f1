"""Writes a checkpoint folder with random weights: a preset's architecture, tokenizer and settings, nothing learnt.

The folder is what `diffusers.GlmImagePipeline.from_pretrained` reads. Training starts from here: the trainers call
`train_bpe`, `build_models` and `write_settings` with their own texts, so a trained folder has the same structure.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from glmimg.atomic_write import expanded, require_absent
from glmimg.checkpoint import BUILDERS, save_component
from glmimg.errors import BadInput, UnknownName
from glmimg.presets import PRESETS, Preset
from glmimg.torch_state import plain_torch, seeded
from glmimg.weights_tools.rewrite import new_folder
from glmimg.weights_tools.streaming import Progress

__all__ = ["build_models", "init_checkpoint", "preset_of", "train_bpe", "write_settings"]

# Ids in front of the bytes: padding, a reference picture's place, begin and end of a grid size.
TEXT_SPECIALS = ("<|endoftext|>", "<|image|>", "<sop>", "<eop>")
# A word with its leading space, one digit with its leading space, a run of signs, or white space.
PIECES = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+"
DTYPES = ("float32", "bfloat16", "float16")

_WORDS = """a red apple on a wooden table, a blue boat on the sea, two green trees under a yellow sun, a white cat and
a black dog on the grass, a small house with a round door, a bowl of hot soup, a sign that says "OPEN", the word "hello"
in big letters, a bird in the sky at night, a purple flower in a glass, three stars above a mountain, an orange fish"""


@plain_torch()
def init_checkpoint(
    directory: str | Path,
    preset: str | Preset = "tiny",
    *,
    seed: int = 0,
    dtype: str = "float32",
    progress: Progress | None = None,
) -> Path:
    """Writes a whole folder at `directory`, which must not exist yet, and returns it.

    `preset` is a name of glmimg.presets.PRESETS or a dict of that form. The tokenizer's merges are learnt from a few
    dozen built-in words, and the rest of the vocabulary is unused. All weights are in memory at once, as float32:
    presets are small. `progress(done, total)` is told the bytes written.
    """
    import torch

    values = preset_of(preset)
    if dtype not in DTYPES:
        raise UnknownName.of("dtype", dtype, DTYPES)
    if not 0 <= seed < 2**63:
        raise BadInput(f"seed {seed}: give a whole number from 0 to 2**63 - 1")
    target = expanded(directory)
    require_absent(target)
    with new_folder(target) as folder:
        write_settings(folder, values, train_bpe([_WORDS], values))
        models = build_models(values, seed=seed)
        width = getattr(torch, dtype).itemsize
        sizes = {name: width * sum(p.numel() for p in model.parameters()) for name, model in models.items()}
        done = 0
        for name, module in models.items():
            torch.nn.Module.to(module, getattr(torch, dtype))  # diffusers' own `to` logs a warning about nothing
            save_component(folder, name, module)
            done += sizes[name]
            if progress:
                progress(done, sum(sizes.values()))
    return target


def preset_of(preset: str | Preset) -> Preset:
    """The preset of that name, or the dict itself once its parts are all there."""
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise UnknownName.of("preset", preset, PRESETS)
        return PRESETS[preset]
    missing = PRESETS["tiny"].keys() - preset.keys()
    if missing:
        raise BadInput(f"a preset needs {', '.join(sorted(missing))} as well; see glmimg/presets.py")
    return preset


@plain_torch()
def build_models(preset: Preset, *, seed: int = 0) -> dict[str, Any]:
    """The four networks with random weights, by the name of their folder; fp32, on the CPU, in evaluation mode."""
    from transformers.generation.configuration_utils import GenerationConfig

    # The libraries initialise from torch's global stream: it is borrowed and put back.
    with seeded(seed):
        order = ("vision_language_encoder", "transformer", "text_encoder", "vae")  # of the draws
        models = {name: BUILDERS[name](preset[name]) for name in order}
    language = preset["vision_language_encoder"]
    codes, vision_vocab = language["image_start_token_id"], language["text_config"]["vision_vocab_size"]
    # transformers' generate would otherwise end a grid early or put ids that are no code into it
    beyond = list(range(codes, vision_vocab))
    models["vision_language_encoder"].generation_config = GenerationConfig.from_dict(
        preset["generation"] | {"suppress_tokens": beyond}
    )
    return {name: model.eval() for name, model in models.items()}


def train_bpe(texts: Iterable[str], preset: Preset) -> Any:
    """A `tokenizers.Tokenizer` in the published vocabulary's order: codes, image start and end, spare ids, then text.

    The text part has exactly as many pieces as the preset says: specials, the 256 bytes, merges learnt from `texts`,
    and, where the texts are too few for that many merges, unused ids.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    text_config = preset["vision_language_encoder"]["text_config"]
    shift, total = text_config["vision_vocab_size"], text_config["vocab_size"]
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = splitter
    learner.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=total - shift,
            special_tokens=list(TEXT_SPECIALS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    learnt = json.loads(learner.to_str())["model"]
    vocabulary = {f"<|dit_token_{i}|>": i for i in range(shift)}
    vocabulary |= {piece: shift + i for piece, i in learnt["vocab"].items()}
    specials = [f"<|dit_token_{i}|>" for i in range(shift)] + list(TEXT_SPECIALS)
    for unused in range(len(vocabulary), total):
        vocabulary[f"<|unused_{unused}|>"] = unused
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(pair) for pair in learnt["merges"]]))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    return tokenizer


def write_settings(folder: str | Path, preset: Preset, tokenizer: Any) -> None:
    """Writes everything of a checkpoint folder that is not weights: index, processor, tokenizers, scheduler."""
    from diffusers import __version__ as diffusers_version
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
    from transformers.models.byt5.tokenization_byt5 import ByT5Tokenizer
    from transformers.models.glm_image.image_processing_pil_glm_image import GlmImageImageProcessorPil
    from transformers.models.glm_image.processing_glm_image import GlmImageProcessor
    from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

    root = Path(folder)
    start = preset["vision_language_encoder"]["image_start_token_id"]
    end = preset["vision_language_encoder"]["image_end_token_id"]
    if len(tokenizer.get_vocab()) != preset["vision_language_encoder"]["text_config"]["vocab_size"]:
        raise BadInput("the tokenizer's size is not the preset's vocab_size: make it with train_bpe and this preset")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=f"<|dit_token_{start}|>",
        eos_token=f"<|dit_token_{end}|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=preset["vision_language_encoder"]["text_config"]["max_position_embeddings"],
        extra_special_tokens={"image_token": "<|image|>", "grid_bos_token": "<sop>", "grid_eos_token": "<eop>"},
    )
    picture = f"<|dit_token_{start}|><|image|><|dit_token_{end}|>"
    template = (
        "{%- for message in messages -%}{%- for part in message['content'] -%}"
        "{%- if part['type'] == 'image' -%}{{- '" + picture + "' -}}"
        "{%- elif part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}"
        "{%- endfor -%}{%- endfor -%}"
    )
    images = GlmImageImageProcessorPil(**preset["preprocessor"])
    GlmImageProcessor(image_processor=images, tokenizer=fast, chat_template=template).save_pretrained(
        root / "processor"
    )
    ByT5Tokenizer().save_pretrained(root / "tokenizer")
    FlowMatchEulerDiscreteScheduler(**preset["scheduler"]).save_pretrained(root / "scheduler")
    index = {
        "_class_name": "GlmImagePipeline",
        "_diffusers_version": diffusers_version,
        "processor": ["transformers", "GlmImageProcessor"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "ByT5Tokenizer"],
        "transformer": ["diffusers", "GlmImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "vision_language_encoder": ["transformers", "GlmImageForConditionalGeneration"],
    }
    (root / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
