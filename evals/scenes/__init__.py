"""The scenes world: COCO-style pictures drawn on the fly, and a small model trained on them."""
