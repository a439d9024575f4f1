"""Changes a picture as a prompt says: python edit.py [MODEL]"""

import sys

from glmimg import EMBEDDED, ImageToImagePipeline, TextToImagePipeline

model = sys.argv[1] if len(sys.argv) > 1 else EMBEDDED
photo = TextToImagePipeline.from_pretrained(model)("a flat sticker of a red apple on a white background").images[0]
photo.save("apple.png")

pipeline = ImageToImagePipeline.from_pretrained(model)
result = pipeline("make the background blue", photo, seed=1)
print(*result.save("apple-on-blue.png"))
