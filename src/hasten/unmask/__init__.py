"""Parts of the canvas loop: how masked-diffusion models decode. One method per file; hasten.policy joins them."""
