"""The token grid as a control: other noise over the same layout, and one half of it drawn anew.

python keep_the_layout.py [MODEL]
"""

import sys

from glmimg import EMBEDDED, TextToImagePipeline, TokenGrid

pipeline = TextToImagePipeline.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else EMBEDDED)
prompt = "a yellow star to the left of a blue circle on a white background"
first = pipeline(prompt, seed=1)
first.save("first.png")

# The same layout: only the decoder runs.
first.tokens[0].save("layout.tokens")
layout = TokenGrid.load("layout.tokens")
pipeline(prompt, tokens=layout, seed=2).save("other-noise.png")

# The right half again, with the tokens of the left half kept; then under the first picture's noise.
half = (layout.width // 2 // 32 * 32, 0, layout.width, layout.height)
mixed = pipeline(prompt, tokens=layout, region=half, seed=2).tokens[0]
pipeline(prompt, tokens=mixed, seed=1).save("other-half.png")
print(f"{int(layout.diff(mixed).sum())} of {mixed.ids_HW.numel()} tokens changed")
layout.picture().save("layout.png")
