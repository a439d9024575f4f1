"""The training world of the embedded model: stickers, shapes, signs and words, composed into captioned scenes."""
