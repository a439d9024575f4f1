"""Makes a page of pictures from a prompt file: PNGs, a contact sheet, index.html with prompt, seed, layout and time.

    python samples/generate_samples.py --output samples/pictures

The pictures carry their settings: `glmimg generate --from PICTURE` makes one again.
"""

from __future__ import annotations

import argparse
import html
import re
import sys
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from glmimg import TextToImagePipeline
from glmimg.cli_progress import Bars
from glmimg.config import parse_size
from glmimg.image_io import save_png

HERE = Path(__file__).parent
COLUMNS = 4
GAP = 8
LINE = 40  # pixels of caption under a picture

# The first that this machine has writes the captions; the last resort has neither accents nor Chinese.
FONTS = ("NotoSansCJK-Regular.ttc", "PingFang.ttc", "msyh.ttc", "DejaVuSans.ttf", "Arial.ttf")

STYLE = """body { font: 15px system-ui, sans-serif; margin: 2rem; color: #222; background: #fff }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: 1.5rem }
figure { margin: 0 } img { max-width: 100% } .layout { height: 64px; image-rendering: pixelated }
small { color: #666 }"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--prompts", type=Path, default=HERE / "prompts.txt")
    parser.add_argument("--output", type=Path, default=Path("samples-out"), metavar="FOLDER")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--size", help="WIDTHxHEIGHT (default: the checkpoint's)")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--font", type=Path, help="font file of the contact sheet's captions")
    parser.add_argument("-n", type=int, default=1, help="pictures of each prompt")
    arguments = parser.parse_args()
    prompts = [line for line in arguments.prompts.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    pipeline = TextToImagePipeline.from_pretrained(arguments.model)
    options: dict[str, Any] = {"num_inference_steps": arguments.steps, "num_images_per_prompt": arguments.n}
    if arguments.size:
        options["width"], options["height"] = parse_size(arguments.size)

    arguments.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, prompt in enumerate(prompts, 1):
        print(f"{number}/{len(prompts)} {prompt}", file=sys.stderr)
        result = pipeline(prompt, seed=arguments.seed, callback=Bars(), **options)
        seconds = (result.timings["tokens"] + result.timings["decoder"]) / len(result.images)
        for k, path in enumerate(result.save(arguments.output / f"{number:02d}.png")):
            layout = path.with_name(f"{path.stem}-layout.png")
            save_png(result.tokens[k].picture(8), layout)
            rows.append((path, layout, result.settings[k], seconds, result.images[k]))
    contact_sheet(rows, caption_font(arguments.font)).save(arguments.output / "sheet.png", optimize=True)
    (arguments.output / "index.html").write_text(page(rows, pipeline.stages.checkpoint.hash), encoding="utf-8")
    print(arguments.output / "index.html")


def caption_font(path: Path | None) -> Any:
    for name in (str(path),) if path else FONTS:
        try:
            return ImageFont.truetype(name, 12)
        except OSError:
            if path:
                sys.exit(f"{path} is no font that can be read: give a .ttf, .otf or .ttc file")
    return ImageFont.load_default(12)


def contact_sheet(rows: list[Any], font: Any) -> Image.Image:
    images = [row[-1] for row in rows]
    width, height = max(image.width for image in images), max(image.height for image in images)
    columns = min(COLUMNS, len(images))
    lines = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, lines * (height + LINE + GAP) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for k, (_, _, settings, _, image) in enumerate(rows):
        left, top = GAP + k % columns * (width + GAP), GAP + k // columns * (height + LINE + GAP)
        sheet.paste(image, (left, top))
        draw.multiline_text((left, top + height + 3), wrapped(settings["prompt"], width, font), fill="black", font=font)
    return sheet


def wrapped(text: str, width: int, font: Any) -> str:
    """The caption in at most two lines; text without spaces breaks anywhere."""
    words = re.findall(r"[\u3000-\uffef]|[^\s\u3000-\uffef]+\s*", text)
    lines = [""]
    for word in words:
        if font.getlength(lines[-1] + word.rstrip()) > width:
            lines.append("")
        lines[-1] += word
    return "\n".join(lines[:2])


def page(rows: list[Any], checkpoint: str) -> str:
    figures = "\n".join(
        f'<figure><img src="{path.name}" alt="{html.escape(settings["prompt"])}"><figcaption>'
        f"{html.escape(settings['prompt'])}<br><small>seed {settings['config']['seed']}, {seconds:.1f} s</small><br>"
        f'<img class="layout" src="{layout.name}" alt="its tokens: preview grid, target grid"></figcaption></figure>'
        for path, layout, settings, seconds, _ in rows
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>glmimg samples</title><style>{STYLE}</style>'
        f"<h1>Samples of checkpoint {checkpoint}</h1><main>\n{figures}\n</main></html>\n"
    )


if __name__ == "__main__":
    main()
