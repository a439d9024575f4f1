"""Follows a picture while it is made: a first look, progress, and a way out.

python watch_and_stop.py [MODEL]
"""

import sys
import time

from glmimg import EMBEDDED, Cancelled, TextToImagePipeline
from glmimg.pipelines.text_to_image import Event

pipeline = TextToImagePipeline.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else EMBEDDED)
deadline = time.monotonic() + 600
looked = False


def watch(event: Event) -> None:
    global looked
    # Of the draft of the layout that was chosen; with a single layout of its preview grid.
    if event.stage in ("tokens", "drafts") and not looked and (look := event.preview()):
        look[0].save("first-look.png")
        looked = True
    if event.step == event.total:
        print(f"{event.stage}: {event.total} steps in {event.seconds:.1f} s")
    if time.monotonic() > deadline:
        raise Cancelled("it took too long")


try:
    pipeline('a red sign that says "OPEN"', callback=watch).save("sign.png")
except Cancelled as reason:
    print(f"stopped: {reason}")
