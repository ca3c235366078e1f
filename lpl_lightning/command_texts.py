"""What ``--help`` says of commands and groups of options, where what Lightning says would not do."""

__all__ = ["COMMANDS", "TITLES"]

COMMANDS = {
    "fit": "Train, with LPL or without; stopped and called again with `--ckpt_path last`, go on.",
    "validate": "Measure the loss on validation images, by noise level too, and a few images that are generated.",
    "test": "Generate images from a checkpoint, measure them against real ones, and write a report.",
    "predict": "Generate images from a checkpoint as PNG files; stopped and called again, go on.",
}
"""What Lightning's own commands do here."""

TITLES = {
    "trainer": "Lightning's Trainer",
    "model": "The model",
    "data": "The data",
    "evaluation": "In `lpl test`, or every so many steps of `lpl fit`, generates images and measures them",
    "validation": "The same in `lpl validate`, with few images",
}
"""Of groups of options, where the first line of a class's docstring would not do."""
