"""Where a checkpoint's parts can go on a machine, and what that costs: memory, bytes moved, time, energy.

Reckoned from configs alone, before anything is downloaded. Memory follows what glmimg.pipelines.stages does; time is
the larger of what memory traffic, arithmetic, calls of the device and the link to the host allow.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from glmimg.errors import BadInput
from glmimg.presets import PRESETS
from glmimg.weights_tools.costs import Costs, Workload

if TYPE_CHECKING:
    from glmimg.backends import Backend
    from glmimg.weights_tools.timing import Timed

__all__ = ["Machine", "Option", "choose_option", "made_first", "measure_machine", "options"]

TILE = 512  # glmimg.pipelines.stages.TILE: larger pictures are decoded in tiles where memory is being saved
BATCH_PATCHES = 1024  # glmimg.pipelines.steps.BATCH_PATCHES: smaller pictures go through the decoder together
HOST = "cpu"

CONTEXT = 500_000_000  # bytes that an accelerator's libraries take for themselves
PROCESS = 450_000_000  # bytes of host memory that Python, torch, transformers and diffusers take (cli_measure)
# What an allocator holds for the VAE beside its tensors (workspaces, fragments): the published table grows by 1.187 GiB
# for each 512x512 pixels, 1.58 times what the tensors take.
RESERVED = 1.58
CALL_SECONDS = 8e-6  # of one call of an accelerator from Python, while it waits for nothing else
# How many times longer a version in fewer bits may not be worth: it is taken only if it is that much faster.
RELUCTANCE = {16: 1.0, 8: 1.15, 4: 1.5}


@dataclass(frozen=True)
class Machine:
    """Bytes of each device and of the host, and their speeds: bytes a second of memory and of the link to the devices,
    arithmetic operations a second. `host_itemsize`: bytes of a number there, 4 on a processor without instructions for
    bfloat16; `itemsize`: on the devices, 4 on those before it; `four_bit_kernel`: whether they multiply by weights in 4
    bits as they are. `watts` of the whole machine, `price` of an hour of it.
    `assumed` names what is neither stated nor measured. `timed`: of the devices (True) or the host (False), what
    glmimg.weights_tools.timing measured of this very work; it takes the place of what the speeds give."""

    devices: tuple[int, ...]
    ram: int
    bandwidth: float = 1e12
    flops: float = 1e14
    link: float = 16e9
    host_bandwidth: float = 30e9
    host_flops: float = 3e11
    host_itemsize: int = 2
    itemsize: int = 2
    four_bit_kernel: bool = True
    watts: float | None = None
    price: float | None = None
    assumed: tuple[str, ...] = ()
    timed: Mapping[bool, Mapping[tuple[int, bool], Timed]] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Option:
    """One way to run. `generator` and `decoder`: the number of their device, or "cpu". Memory in bytes; `moved`: bytes
    from host to devices in one call; seconds of one call, all pictures, weights loaded; `short`: what does not fit."""

    bits: int
    offload: str
    generator: int | str
    decoder: int | str
    device_peaks: tuple[int, ...]
    ram: int
    moved: int
    seconds: dict[str, float] = field(hash=False)
    watt_hours: float | None  # of one picture, as is the cost
    cost: float | None
    weights: int
    short: tuple[str, ...]

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def fits(self) -> bool:
        return not self.short

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "bits": self.bits,
            "offload": self.offload,
            "generator": self.generator,
            "decoder": self.decoder,
            "device_peak_bytes": list(self.device_peaks),
            "ram_bytes": self.ram,
            "moved_bytes": self.moved,
            "seconds": {name: round(value, 4) for name, value in self.seconds.items()}
            | {"total": round(self.total, 4)},
            "watt_hours_per_picture": self.watt_hours,
            "cost_per_picture": self.cost,
            "weight_bytes": self.weights,
            "fits": self.fits,
            "short": list(self.short),
        }

    def calls(self, model: str, kind: str | None = None) -> list[str]:
        """The commands and the from_pretrained call that run it; `kind` is the devices' name, such as doctor prints."""
        lines, model = made_first(model)
        name = model
        if self.bits < 16:
            name = f"{model.rstrip('/').rsplit('/', 1)[-1].lower()}-int{self.bits}"
            lines.append(f"glmimg weights quantize {quote(model)} {quote(name)} --bits {self.bits}")
        arguments = [repr(name)]
        places = {"generator": self.generator, "decoder": self.decoder}
        if set(places.values()) != {0} or len(self.device_peaks) > 1:
            named = {s: HOST if p == HOST else f"{kind or 'KIND'}:{p}" for s, p in places.items()}
            if kind is None and set(places.values()) != {HOST}:
                lines.append("# for KIND put what `glmimg doctor` calls the devices of that machine")
            one = len(set(named.values())) == 1
            arguments.append(f"backend={named['decoder']!r}" if one else f"backend={named!r}")
        elif kind:
            arguments.append(f"backend={kind!r}")
        if self.offload != "none":
            arguments.append(f"offload={self.offload!r}")
        return [*lines, f"TextToImagePipeline.from_pretrained({', '.join(arguments)})"]


def made_first(model: str) -> tuple[list[str], str]:
    """Commands that make a checkpoint folder of a preset or a single file, and its name; none where `model` is one."""
    if model in PRESETS and not os.path.isdir(model):
        return [f"glmimg weights init {quote(model)} --preset {quote(model)}"], model
    if os.path.isfile(os.path.expanduser(model)):
        folder = Path(model).stem
        return [f"glmimg weights convert {quote(model)} {quote(folder)}"], folder
    return [], model


def options(costs: Costs, machine: Machine, work: Workload) -> list[Option]:
    """Every sensible combination, the best first; those that do not fit last."""
    if not machine.devices and machine.ram <= 0:
        raise BadInput("no memory to plan for: give --device SIZE for each device, or --ram SIZE for a processor alone")
    for name in ("bandwidth", "flops", "link", "host_bandwidth", "host_flops"):
        if not getattr(machine, name) > 0:
            raise BadInput(f"{name} {getattr(machine, name)}: give a number above 0")
    found = []
    for bits in (16, 8, 4):
        widths = {False: machine.host_itemsize, True: machine.itemsize}
        versions = {
            on_device: _Version.of(replace(costs, itemsize=width), work, bits) for on_device, width in widths.items()
        }
        for generator, decoder, offload in _placements(len(machine.devices)):
            if (bits, generator, offload) == (4, HOST, "block"):
                continue  # processors' 4-bit kernel needs each block laid out anew for every token
            found.append(_option(versions, machine, work, generator, decoder, offload))
    return sorted(found, key=lambda option: (not option.fits, option.total * RELUCTANCE[option.bits], -option.bits))


def choose_option(found: Sequence[Option]) -> Option:
    """The best that fits; BadInput, telling the nearest miss, if none does."""
    if found and found[0].fits:
        return found[0]
    nearest = min(found, key=lambda option: max([*option.device_peaks, 0]) + option.ram)
    raise BadInput(
        f"nothing fits. The smallest way ({nearest.bits} bits, offload {nearest.offload!r}) is short of memory: "
        f"{'; '.join(nearest.short)}. Ask for a smaller --size or fewer pictures, or add memory"
    )


def _placements(devices: int) -> Iterator[tuple[int | str, int | str, str]]:
    """(generator, decoder, offload). Stages on two devices need not make room for each other."""
    places: list[int | str] = [*range(devices), HOST]
    for generator in places:
        for decoder in places:
            if generator == decoder:
                yield from ((generator, decoder, offload) for offload in ("none", "stage", "block"))
            else:
                yield generator, decoder, "none"
                if HOST not in (generator, decoder):
                    yield generator, decoder, "block"


@dataclass(frozen=True)
class _Version:
    """The figures of a checkpoint in so many bits that every option needs; reckoned once."""

    costs: Costs
    bits: int
    generator: int
    building: int
    host_copies: tuple[int, int]
    generator_blocks: int
    generator_block: int
    traffic: dict[bool, int]
    decoder: int
    decoder_blocks: int
    decoder_block: int
    others: int  # glyph encoder and VAE
    unpacked: int
    whole_matrix: int

    @classmethod
    def of(cls, costs: Costs, work: Workload, bits: int) -> _Version:
        language, decoder = "vision_language_encoder", "transformer"
        return cls(
            costs,
            bits,
            costs.weights(language, bits),
            costs.building(bits),
            costs.host_copies(bits),
            costs.blocks(language, bits),
            costs.block(language, bits),
            {kernels: costs.step_traffic(work, bits, kernels) for kernels in (False, True)},
            costs.weights(decoder, bits),
            costs.blocks(decoder, bits),
            costs.block(decoder, bits),
            costs.weights("text_encoder", bits) + costs.vae_bytes(),
            costs.unpacked_per_forward(bits),
            costs.whole_matrix(bits),
        )

    @property
    def total(self) -> int:
        return self.generator + self.decoder + self.others


def _option(
    versions: Mapping[bool, _Version],
    machine: Machine,
    work: Workload,
    generator: int | str,
    decoder: int | str,
    offload: str,
) -> Option:
    first, second = versions[generator != HOST], versions[decoder != HOST]
    batch, together = _batch(work, decoder, offload)
    # Memory of each stage: weights that stay, and what is needed on top of them.
    held_g, held_d = first.generator, second.decoder + second.others
    if offload == "block":
        held_g += 3 * first.generator_block - first.generator_blocks  # one at work, one come, one coming
        held_d += 2 * second.decoder_block - second.decoder_blocks
    else:
        held_g += first.host_copies[0] * (generator == HOST)
        held_d += second.host_copies[1] * (decoder == HOST)
    top_g = first.costs.cache(work) + (0 if generator == HOST else first.whole_matrix)
    mapped = generator == HOST and first.costs.itemsize == 2  # all of it, until its blocks are laid out anew
    building = 0 if offload == "block" else -min(0, first.host_copies[0]) if mapped else first.building
    side = [min(edge, TILE) if offload != "none" else edge for edge in (work.height, work.width)]
    decoding = int(RESERVED * second.costs.vae_activations(*side)) * together
    top_d = max(second.costs.decoder_activations(work, batch) + second.whole_matrix, decoding)
    peaks: dict[int | str, int] = {}
    if generator != decoder:
        peaks[generator], peaks[decoder] = held_g + max(top_g, building), held_d + top_d
    elif offload == "none":
        peaks[decoder] = max(held_g + building, held_g + held_d + max(top_g, top_d))
    else:
        peaks[decoder] = max(held_g + max(top_g, building), held_d + top_d)
    pinned = 0
    moved = 0
    for place, blocks, runs in (
        (generator, first.generator_blocks, first.costs.tokens(work)),
        (decoder, second.decoder_blocks, work.steps * work.pictures),
    ):
        if place != HOST and offload == "block":
            pinned, moved = max(pinned, blocks), moved + blocks * runs  # the stages take turns
    if offload == "stage" and decoder != HOST:
        moved = held_g + held_d
    device_peaks = tuple(peaks[k] + CONTEXT if k in peaks else 0 for k in range(len(machine.devices)))
    ram = PROCESS + pinned + peaks.get(HOST, 0)
    seconds = _seconds(versions, machine, work, generator, decoder, offload, batch)
    if offload == "stage":
        seconds["loading"] = moved / machine.link
    short = [
        f"device {k} needs {peak / 1e9:.1f} of {size / 1e9:.1f} GB"
        for k, (peak, size) in enumerate(zip(device_peaks, machine.devices, strict=True))
        if peak > size
    ]
    if ram > machine.ram:
        short.append(f"the host needs {ram / 1e9:.1f} of {machine.ram / 1e9:.1f} GB")
    hours = sum(seconds.values()) / 3600 / work.pictures
    energy, cost = (None if rate is None else rate * hours for rate in (machine.watts, machine.price))
    places = generator, decoder, device_peaks, ram, moved, seconds, energy, cost
    return Option(first.bits, offload, *places, versions[True].total, tuple(short))


def _batch(work: Workload, decoder: int | str, offload: str) -> tuple[int, int]:
    """Rows of one forward of the decoder, and pictures decoded together."""
    if offload == "block":
        return 1, 1
    together = 1 if decoder == HOST else min(work.pictures, max(1, BATCH_PATCHES // work.patches))
    return together * (2 if work.guidance else 1), together


def _seconds(
    versions: Mapping[bool, _Version],
    machine: Machine,
    work: Workload,
    generator: int | str,
    decoder: int | str,
    offload: str,
    batch: int,
) -> dict[str, float]:
    version = versions[generator != HOST]
    costs = version.costs
    bandwidth, flops = _speeds(machine, generator)
    tokens = costs.tokens(work)
    kernel = machine.four_bit_kernel and version.bits == 4 and machine.itemsize == 2 and offload != "block"
    step = version.traffic[generator == HOST or kernel] / bandwidth + costs.token_flops(work) / tokens / flops
    if generator != HOST:
        step = max(step, costs.step_ops() * CALL_SECONDS)
        if offload == "block":
            step = max(step, version.generator_blocks / machine.link)
    timed = machine.timed.get(generator != HOST, {}).get((version.bits, offload == "block"))
    prompt = 0.0
    if timed is not None:
        prompt, measured = timed.prompt, timed.step
        streaming = version.generator_blocks / machine.link if generator != HOST and offload == "block" else 0.0
        step = max(measured, streaming)
    version = versions[decoder != HOST]
    bandwidth, flops = _speeds(machine, decoder)
    forwards = costs.forwards(work) * work.pictures
    forward = costs.forward_flops(work) / flops + version.unpacked / bandwidth / batch
    halves = 2 if work.guidance else 1  # of a step: streamed blocks come once for both
    streaming = version.decoder_blocks / machine.link / halves if decoder != HOST and offload == "block" else 0.0
    vae = costs.vae_flops(work) / flops
    timed = machine.timed.get(decoder != HOST, {}).get((version.bits, offload == "block"))
    if timed is not None:
        forward, vae = timed.forward / halves, timed.vae
    seconds = max(forward, streaming) * forwards
    return {"tokens": prompt + step * tokens, "decoder": seconds, "vae": vae * work.pictures}


def _speeds(machine: Machine, place: int | str) -> tuple[float, float]:
    if place == HOST:
        return machine.host_bandwidth, machine.host_flops
    return machine.bandwidth, machine.flops


def measure_machine(backend: Backend, seconds: float = 0.4) -> dict[str, float]:
    """bandwidth, flops and link of one device, each measured for that long: a copy, a product in the device's own
    dtype, and a copy from the host. A processor has no link."""
    import torch

    from glmimg.weights_tools.timing import seconds_of

    def rate(amount: float, work: Any) -> float:
        return amount / max(seconds_of(work, backend, seconds), 1e-9)

    size = 64 << 20
    source = torch.ones(size, dtype=torch.uint8, device=backend.device)
    target = torch.empty_like(source)
    side = 1024 if backend.device.type == HOST else 4096
    matrix = torch.ones(side, side, dtype=backend.dtype, device=backend.device)
    found = {
        "bandwidth": rate(2 * size, lambda: target.copy_(source)),  # read and written
        "flops": rate(2 * side**3, lambda: torch.mm(matrix, matrix)),
    }
    if backend.device.type != HOST:
        host = backend.pin(torch.ones(size, dtype=torch.uint8))
        found["link"] = rate(size, lambda: target.copy_(host))
    return found
