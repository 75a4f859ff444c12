"""The evaluation of a trained run: steps, per-case measures and what is stored of them."""
