"""Two layouts for one prompt, saved with everything that makes them again: python text_to_image.py [MODEL]"""

import sys

from glmimg import EMBEDDED, TextToImagePipeline

pipeline = TextToImagePipeline.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else EMBEDDED)
result = pipeline("a 3D render of a fox on a light blue background", num_images_per_prompt=2, seed=3)
print(*result.save("fox.png"))
print(result.timings)
